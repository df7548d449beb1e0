// As much of DeepStream's interface as a parser of detections is compiled against: the names, the
// order of the fields and the types of NVIDIA's documentation of nvdsinfer, for a machine without
// DeepStream.
#pragma once
#include <string>
#include <vector>

#define NVDSINFER_MAX_DIMS 8
struct NvDsInferDims {
    unsigned int numDims;
    unsigned int d[NVDSINFER_MAX_DIMS];
    unsigned int numElements;
};
enum NvDsInferDataType { FLOAT = 0, HALF = 1, INT8 = 2, INT32 = 3 };
struct NvDsInferLayerInfo {
    NvDsInferDataType dataType;
    NvDsInferDims inferDims;
    int bindingIndex;
    const char *layerName;
    void *buffer;
    int isInput;
};
struct NvDsInferNetworkInfo {
    unsigned int width, height, channels;
};
struct NvDsInferParseDetectionParams {
    unsigned int numClassesConfigured;
    std::vector<float> perClassPreclusterThreshold;
    std::vector<float> perClassPostclusterThreshold;
};
struct NvDsInferParseObjectInfo {
    unsigned int classId;
    float left, top, width, height;
    float detectionConfidence;
};
#define CHECK_CUSTOM_PARSE_FUNC_PROTOTYPE(function)                                             \
    static bool (*checked_##function)(                                                          \
        const std::vector<NvDsInferLayerInfo> &, const NvDsInferNetworkInfo &,                  \
        const NvDsInferParseDetectionParams &, std::vector<NvDsInferParseObjectInfo> &)         \
        __attribute__((unused)) = function
