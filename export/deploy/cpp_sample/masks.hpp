// From mask logits on the cells of the canvas to pixels of the image, value for value as the Python
// package does it: enlarged bilinearly, compared with the threshold, and kept around the box; then
// as run lengths of COCO (column by column, packed into text).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "preprocess.hpp"

struct Mask {
  int height = 0;
  int width = 0;
  std::vector<std::uint8_t> pixels;  // column by column, 1 inside the object
};

namespace mask_detail {

// The two cells a pixel lies between, and how far along.
struct Between {
  int first = 0;
  int second = 0;
  float share = 0.0f;
};

inline Between between(int pixel, int count, float valid, int cells) {
  const double place =
      (pixel + 0.5) * (static_cast<double>(valid) / (count * model_info::kMaskStride)) - 0.5;
  const double low = std::floor(place);
  const int cell = static_cast<int>(low);
  return {std::clamp(cell, 0, cells - 1), std::clamp(cell + 1, 0, cells - 1),
          static_cast<float>(place - low)};
}

// First pixel of a side of the box after it has grown, and the one after the last.
struct Span {
  int low = 0;
  int high = 0;
};

inline Span span(float low, float high, int count) {
  if (!std::isfinite(low) || !std::isfinite(high)) return {};
  const double first = low, last = high;
  const double grown = model_info::kMaskMargin * (last - first);
  const auto within = [count](double value) {
    return static_cast<int>(std::clamp(value, 0.0, static_cast<double>(count)));
  };
  return {within(std::floor(first - grown)), within(std::ceil(last + grown))};
}

}  // namespace mask_detail

// The mask of one detection.
//   logits: [kMaskHeight, kMaskWidth]; box: x0 y0 x1 y1 in pixels of the image
inline Mask enlarged(const float* logits, const float* box, const Input& input) {
  using namespace model_info;
  using namespace mask_detail;
  Mask mask;
  mask.height = static_cast<int>(input.original_size[0]);
  mask.width = static_cast<int>(input.original_size[1]);
  mask.pixels.assign(static_cast<std::size_t>(mask.height) * mask.width, 0);
  const Span columns = span(box[0], box[2], mask.width);
  const Span rows = span(box[1], box[3], mask.height);
  const float limit = static_cast<float>(std::log(kMaskThreshold / (1.0 - kMaskThreshold)));
  for (int x = columns.low; x < columns.high; ++x) {
    const Between across = between(x, mask.width, input.valid_size[1], kMaskWidth);
    std::uint8_t* column = mask.pixels.data() + static_cast<std::size_t>(x) * mask.height;
    for (int y = rows.low; y < rows.high; ++y) {
      const Between down = between(y, mask.height, input.valid_size[0], kMaskHeight);
      const float* upper = logits + static_cast<std::size_t>(down.first) * kMaskWidth;
      const float* lower = logits + static_cast<std::size_t>(down.second) * kMaskWidth;
      const auto between_rows = [&](int cell) {
        return upper[cell] + down.share * (lower[cell] - upper[cell]);
      };
      const float left = between_rows(across.first);
      const float right = between_rows(across.second);
      column[y] = left + across.share * (right - left) > limit;
    }
  }
  return mask;
}

// Run lengths as text: counts of zeros and ones in turns, from the fourth on the difference to the
// last but one; groups of five bits, the lowest first, a sixth bit where another group follows.
inline std::string run_lengths(const Mask& mask) {
  std::vector<std::int64_t> counts{0};
  std::uint8_t current = 0;
  for (const std::uint8_t pixel : mask.pixels) {
    if (pixel != current) {
      counts.push_back(0);
      current = pixel;
    }
    ++counts.back();
  }
  std::string text;
  for (std::size_t k = 0; k < counts.size(); ++k) {
    std::int64_t value = k > 2 ? counts[k] - counts[k - 2] : counts[k];
    for (bool more = true; more;) {
      std::int64_t group = value & 31;
      value >>= 5;
      more = group & 16 ? value != -1 : value != 0;
      if (more) group |= 32;
      text.push_back(static_cast<char>(group + 48));
    }
  }
  return text;
}
