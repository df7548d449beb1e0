// Hands a detector's output to DeepStream: nvinfer calls NvDsInferParseDetr once for each frame of a
// batch, with that frame's part of the output.
//
// The graph's one output is `detections`, float32 [batch, found, 6]: x0 y0 x1 y1 in pixels of the
// network's input, score, class. They need no clustering and no non-maximum suppression.
#include <algorithm>
#include <cstring>
#include <iostream>
#include <vector>

#include "nvdsinfer_custom_impl.h"

extern "C" bool NvDsInferParseDetr(const std::vector<NvDsInferLayerInfo> &layers,
                                   const NvDsInferNetworkInfo &network,
                                   const NvDsInferParseDetectionParams &parameters,
                                   std::vector<NvDsInferParseObjectInfo> &objects) {
    const NvDsInferLayerInfo *detections = nullptr;
    for (const NvDsInferLayerInfo &layer : layers) {
        if (!layer.isInput && std::strcmp(layer.layerName, "detections") == 0) detections = &layer;
    }
    const unsigned fields = 6;
    if (detections == nullptr || detections->dataType != FLOAT ||
        detections->inferDims.numDims != 2 || detections->inferDims.d[1] != fields) {
        std::cerr << "NvDsInferParseDetr: no float output `detections` of shape [found, 6]; is "
                     "model.onnx the one that was exported with this parser?\n";
        return false;
    }
    const float *row = static_cast<const float *>(detections->buffer);
    const float width = static_cast<float>(network.width);
    const float height = static_cast<float>(network.height);
    for (unsigned i = 0; i < detections->inferDims.d[0]; ++i, row += fields) {
        const float score = row[4];
        // A class no threshold is known of is none of the labels'. Not a number is neither.
        if (!(row[5] >= 0.0f && row[5] < static_cast<float>(parameters.numClassesConfigured))) {
            continue;
        }
        const unsigned label = static_cast<unsigned>(row[5]);
        if (!(score >= parameters.perClassPreclusterThreshold[label])) continue;
        const float left = std::clamp(row[0], 0.0f, width);
        const float top = std::clamp(row[1], 0.0f, height);
        const float right = std::clamp(row[2], 0.0f, width);
        const float bottom = std::clamp(row[3], 0.0f, height);
        if (!(right > left && bottom > top)) continue;
        NvDsInferParseObjectInfo object{};
        object.classId = label;
        object.detectionConfidence = score;
        object.left = left;
        object.top = top;
        object.width = right - left;
        object.height = bottom - top;
        objects.push_back(object);
    }
    return true;
}

CHECK_CUSTOM_PARSE_FUNC_PROTOTYPE(NvDsInferParseDetr);
