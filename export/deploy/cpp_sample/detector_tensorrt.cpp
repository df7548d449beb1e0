// A TensorRT engine (10.x or 11.x), built on this GPU from the bundle with: detr export trt
#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include <cstdio>
#include <fstream>
#include <iterator>
#include <map>
#include <stdexcept>

#include "detector.hpp"

namespace {

void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

class Logger : public nvinfer1::ILogger {
  void log(Severity severity, const char* message) noexcept override {
    if (severity <= Severity::kWARNING) std::fprintf(stderr, "%s\n", message);
  }
};

class Buffer {
 public:
  explicit Buffer(std::size_t bytes) { check(cudaMalloc(&data_, bytes)); }
  Buffer(Buffer&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
  Buffer(const Buffer&) = delete;
  ~Buffer() { cudaFree(data_); }
  void* get() const { return data_; }

 private:
  void* data_ = nullptr;
};

std::size_t count(const nvinfer1::Dims& dims) {
  std::size_t total = 1;
  for (int k = 0; k < dims.nbDims; ++k) total *= dims.d[k];
  return total;
}

}  // namespace

struct Detector::State {
  Logger logger;
  std::unique_ptr<nvinfer1::IRuntime> runtime;
  std::unique_ptr<nvinfer1::ICudaEngine> engine;
  std::unique_ptr<nvinfer1::IExecutionContext> context;
  cudaStream_t stream = nullptr;
  std::map<std::string, Buffer> buffers;

  void bind(const char* name, std::size_t bytes) {
    auto found = buffers.find(name);
    if (found == buffers.end()) found = buffers.emplace(name, Buffer(bytes)).first;
    if (!context->setTensorAddress(name, found->second.get())) {
      throw std::runtime_error(std::string(name) + ": not a tensor of this engine");
    }
  }

  void feed(const char* name, const std::vector<float>& data, const nvinfer1::Dims& dims) {
    if (!context->setInputShape(name, dims)) {
      throw std::runtime_error(std::string(name) + ": the engine's profile has no such shape");
    }
    bind(name, data.size() * sizeof(float));
    check(cudaMemcpyAsync(buffers.at(name).get(), data.data(), data.size() * sizeof(float),
                          cudaMemcpyHostToDevice, stream));
  }

  // The first image's share of an output.
  template <typename T>
  std::vector<T> fetch(const char* name) {
    std::vector<T> data(count(context->getTensorShape(name)) / model_info::kBatch);
    check(cudaMemcpyAsync(data.data(), buffers.at(name).get(), data.size() * sizeof(T),
                          cudaMemcpyDeviceToHost, stream));
    check(cudaStreamSynchronize(stream));
    return data;
  }

  ~State() {
    buffers.clear();
    if (stream != nullptr) cudaStreamDestroy(stream);
  }
};

Detector::Detector(const std::string& model) : state_(std::make_unique<State>()) {
  std::ifstream file(model, std::ios::binary);
  if (!file) throw std::runtime_error(model + ": cannot be opened");
  const std::vector<char> plan{std::istreambuf_iterator<char>(file), {}};
  State& s = *state_;
  s.runtime.reset(nvinfer1::createInferRuntime(s.logger));
  s.engine.reset(s.runtime->deserializeCudaEngine(plan.data(), plan.size()));
  if (!s.engine) throw std::runtime_error(model + ": not an engine for this GPU and TensorRT");
  s.context.reset(s.engine->createExecutionContext());
  check(cudaStreamCreate(&s.stream));
}

Detector::~Detector() = default;

Detections Detector::operator()(const Input& input) {
  using namespace model_info;
  using nvinfer1::Dims;
  State& s = *state_;
  s.feed("images", repeated(input.images.data(), input.images.size()),
         Dims{4, {kBatch, 3, kHeight, kWidth}});
  s.feed("valid_sizes", repeated(input.valid_size.data(), 2), Dims{2, {kBatch, 2}});
  s.feed("original_sizes", repeated(input.original_size.data(), 2), Dims{2, {kBatch, 2}});
  s.bind("boxes", count(s.context->getTensorShape("boxes")) * sizeof(float));
  s.bind("scores", count(s.context->getTensorShape("scores")) * sizeof(float));
  s.bind("labels", count(s.context->getTensorShape("labels")) * sizeof(std::int64_t));
  if (kMasks) s.bind("masks", count(s.context->getTensorShape("masks")) * sizeof(float));
  if (!s.context->enqueueV3(s.stream)) throw std::runtime_error("the engine did not run");
  Detections found;
  found.boxes = s.fetch<float>("boxes");
  found.scores = s.fetch<float>("scores");
  found.labels = s.fetch<std::int64_t>("labels");
  if (kMasks) found.masks = s.fetch<float>("masks");
  return found;
}
