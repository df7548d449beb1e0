// From RGB pixels to the network's input, value for value as the Python package does it: scaled,
// placed at the top left of the canvas, normalized, and zero where there is no image.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <vector>

#include "image.hpp"
#include "model_info.hpp"

struct Input {
  std::vector<float> images;                 // [3, kHeight, kWidth]
  std::array<float, 2> valid_size{};         // height, width of the image inside the canvas
  std::array<float, 2> original_size{};      // height, width of the image as read
};

namespace preprocess_detail {

// Weights of the source pixels of one target pixel.
struct Taps {
  int first = 0;
  std::vector<std::int32_t> weights;  // fixed point, kBits after the point
};

constexpr int kBits = 22;

// A triangle filter as wide as the reduction (antialiased bilinear), in the fixed-point arithmetic
// of the Pillow library, so that the results agree to the last bit.
inline std::vector<Taps> triangle(int source, int target) {
  const double scale = static_cast<double>(source) / target;
  const double reach = std::max(scale, 1.0);
  std::vector<Taps> result(target);
  for (int k = 0; k < target; ++k) {
    const double center = (k + 0.5) * scale;
    const int first = std::max(0, static_cast<int>(center - reach + 0.5));
    const int last = std::min(source, static_cast<int>(center + reach + 0.5));
    std::vector<double> weights;
    double total = 0.0;
    for (int x = first; x < last; ++x) {
      const double weight = std::max(0.0, 1.0 - std::abs((x - center + 0.5) / reach));
      weights.push_back(weight);
      total += weight;
    }
    result[k].first = first;
    for (const double weight : weights) {
      result[k].weights.push_back(static_cast<std::int32_t>(weight / total * (1 << kBits) + 0.5));
    }
  }
  return result;
}

inline std::uint8_t rounded(std::int64_t sum) {
  return static_cast<std::uint8_t>(std::clamp<std::int64_t>(sum >> kBits, 0, 255));
}

// Rows first, then columns, each rounded to bytes.
inline Image resize(const Image& image, int height, int width) {
  Image wide{image.height, width, {}};
  if (width == image.width) {
    wide.rgb = image.rgb;
  } else {
    const auto taps = triangle(image.width, width);
    wide.rgb.resize(std::size_t{3} * image.height * width);
    for (int y = 0; y < image.height; ++y) {
      const std::uint8_t* row = image.rgb.data() + std::size_t{3} * y * image.width;
      for (int x = 0; x < width; ++x) {
        for (int c = 0; c < 3; ++c) {
          std::int64_t sum = std::int64_t{1} << (kBits - 1);
          for (std::size_t k = 0; k < taps[x].weights.size(); ++k) {
            sum += std::int64_t{taps[x].weights[k]} * row[3 * (taps[x].first + k) + c];
          }
          wide.rgb[(std::size_t{1} * y * width + x) * 3 + c] = rounded(sum);
        }
      }
    }
  }
  if (height == image.height) return wide;
  const auto taps = triangle(image.height, height);
  const std::size_t stride = std::size_t{3} * width;
  Image result{height, width, std::vector<std::uint8_t>(stride * height)};
  for (int y = 0; y < height; ++y) {
    for (std::size_t at = 0; at < stride; ++at) {
      std::int64_t sum = std::int64_t{1} << (kBits - 1);
      for (std::size_t k = 0; k < taps[y].weights.size(); ++k) {
        sum += std::int64_t{taps[y].weights[k]} * wide.rgb[(taps[y].first + k) * stride + at];
      }
      result.rgb[y * stride + at] = rounded(sum);
    }
  }
  return result;
}

// Half to even, as Python rounds, and at least one pixel.
inline int fitted(int size, double scale, int canvas) {
  return std::min(canvas, std::max(1, static_cast<int>(std::nearbyint(size * scale))));
}

// Height and width with a short side of `side`, or of less where the long one would exceed `limit`.
inline std::array<int, 2> shortest_side(const Image& image, int side, int limit) {
  const double low = std::min(image.height, image.width);
  const double high = std::max(image.height, image.width);
  if (high / low * side > limit) {
    side = std::max(1, static_cast<int>(std::nearbyint(limit * low / high)));
  }
  if (low == side) return {image.height, image.width};
  const int other = static_cast<int>(side * high / low);
  return image.width < image.height ? std::array<int, 2>{other, side}
                                    : std::array<int, 2>{side, other};
}

// Height and width to which an image is scaled.
inline std::array<int, 2> scaled(const Image& image) {
  using namespace model_info;
  if (kShort > 0) {
    const auto size = shortest_side(image, kShort, kLong);
    if (size[0] <= kHeight && size[1] <= kWidth) return size;
  }
  const double scale = std::min(static_cast<double>(kHeight) / image.height,
                                static_cast<double>(kWidth) / image.width);
  return {fitted(image.height, scale, kHeight), fitted(image.width, scale, kWidth)};
}

}  // namespace preprocess_detail

inline Input preprocess(const Image& image) {
  using namespace model_info;
  const auto [height, width] = preprocess_detail::scaled(image);
  const Image small = preprocess_detail::resize(image, height, width);
  Input input;
  input.images.assign(std::size_t{3} * kHeight * kWidth, 0.0f);
  for (int c = 0; c < 3; ++c) {
    const float factor = 1.0f / kStd[c];
    for (int y = 0; y < height; ++y) {
      float* out = input.images.data() + (std::size_t{1} * c * kHeight + y) * kWidth;
      const std::uint8_t* in = small.rgb.data() + std::size_t{3} * y * width + c;
      for (int x = 0; x < width; ++x) out[x] = (in[3 * x] - kMean[c]) * factor;
    }
  }
  input.valid_size = {static_cast<float>(height), static_cast<float>(width)};
  input.original_size = {static_cast<float>(image.height), static_cast<float>(image.width)};
  return input;
}
