// What every runtime's detector gives back.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "preprocess.hpp"

struct Detections {
  std::vector<float> boxes;          // [N, 4] x0 y0 x1 y1 in pixels of the image as read
  std::vector<float> scores;         // [N], the best first
  std::vector<std::int64_t> labels;  // [N], positions in model_info::kClasses
  std::vector<float> masks;  // logits [N, kMaskHeight, kMaskWidth], see masks.hpp; empty without
};

class Detector {
 public:
  explicit Detector(const std::string& model);
  ~Detector();
  // Runs one image; a larger static batch is filled up with copies of it.
  Detections operator()(const Input& input);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// `input` once for every place of the batch.
inline std::vector<float> repeated(const float* data, std::size_t size) {
  std::vector<float> result;
  result.reserve(size * model_info::kBatch);
  for (int k = 0; k < model_info::kBatch; ++k) result.insert(result.end(), data, data + size);
  return result;
}
