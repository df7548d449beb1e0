// Calls a parser as nvinfer does: once for each frame of a batch, the buffer being that frame's part
// of the output. Compiled with parser.cpp by test_deepstream.py, which plays nvinfer's caller.
#include <cstring>

#include "nvdsinfer_custom_impl.h"

extern "C" bool NvDsInferParseDetr(const std::vector<NvDsInferLayerInfo> &,
                                   const NvDsInferNetworkInfo &,
                                   const NvDsInferParseDetectionParams &,
                                   std::vector<NvDsInferParseObjectInfo> &);

// Writes class, left, top, width, height, score of each object to `objects`; -1: the parser refused.
extern "C" int parse(float *output, int frame, int found, int fields, int type, int width,
                     int height, int classes, float threshold, double *objects) {
    NvDsInferLayerInfo layer{};
    layer.dataType = static_cast<NvDsInferDataType>(type);
    layer.inferDims.numDims = 2;
    layer.inferDims.d[0] = found;
    layer.inferDims.d[1] = fields;
    layer.inferDims.numElements = found * fields;
    layer.layerName = "detections";
    layer.buffer = output + static_cast<long>(frame) * layer.inferDims.numElements;
    const NvDsInferNetworkInfo network{static_cast<unsigned>(width), static_cast<unsigned>(height),
                                       3};
    NvDsInferParseDetectionParams parameters{};
    parameters.numClassesConfigured = classes;
    parameters.perClassPreclusterThreshold.assign(classes, threshold);
    std::vector<NvDsInferParseObjectInfo> result;
    if (!NvDsInferParseDetr({layer}, network, parameters, result)) return -1;
    for (const NvDsInferParseObjectInfo &object : result) {
        const double values[] = {static_cast<double>(object.classId), object.left, object.top,
                                 object.width, object.height, object.detectionConfidence};
        std::memcpy(objects, values, sizeof values);
        objects += 6;
    }
    return static_cast<int>(result.size());
}
