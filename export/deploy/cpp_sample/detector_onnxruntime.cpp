// The model in ONNX Runtime, through its C++ API (a header over the C API).
#include <onnxruntime_cxx_api.h>

#include "detector.hpp"

struct Detector::State {
  Ort::Env env{ORT_LOGGING_LEVEL_WARNING, "detect"};
  Ort::Session session{nullptr};
  Ort::MemoryInfo memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);

  Ort::Value tensor(std::vector<float>& data, const std::vector<std::int64_t>& shape) {
    return Ort::Value::CreateTensor<float>(memory, data.data(), data.size(), shape.data(),
                                           shape.size());
  }
};

Detector::Detector(const std::string& model) : state_(std::make_unique<State>()) {
  Ort::SessionOptions options;
  state_->session = Ort::Session(state_->env, model.c_str(), options);
}

Detector::~Detector() = default;

Detections Detector::operator()(const Input& input) {
  using namespace model_info;
  std::vector<float> images = repeated(input.images.data(), input.images.size());
  std::vector<float> valid = repeated(input.valid_size.data(), 2);
  std::vector<float> original = repeated(input.original_size.data(), 2);
  std::array<Ort::Value, 3> inputs{
      state_->tensor(images, {kBatch, 3, kHeight, kWidth}),
      state_->tensor(valid, {kBatch, 2}),
      state_->tensor(original, {kBatch, 2}),
  };
  const char* in[] = {"images", "valid_sizes", "original_sizes"};
  const char* out[] = {"boxes", "scores", "labels", "masks"};
  const auto results =
      state_->session.Run(Ort::RunOptions{nullptr}, in, inputs.data(), 3, out, kMasks ? 4 : 3);
  const std::size_t count = results[1].GetTensorTypeAndShapeInfo().GetShape().at(1);
  const float* boxes = results[0].GetTensorData<float>();
  const float* scores = results[1].GetTensorData<float>();
  const std::int64_t* labels = results[2].GetTensorData<std::int64_t>();
  Detections found{{boxes, boxes + 4 * count}, {scores, scores + count},
                   {labels, labels + count}, {}};
  if (kMasks) {
    const float* masks = results[3].GetTensorData<float>();
    found.masks.assign(masks, masks + count * kMaskHeight * kMaskWidth);
  }
  return found;
}
