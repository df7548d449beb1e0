// Binary PPM (P6, 8 bit) and uncompressed 24-bit BMP files as RGB pixels.
#pragma once

#include <cctype>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

struct Image {
  int height = 0;
  int width = 0;
  std::vector<std::uint8_t> rgb;  // row by row, three bytes a pixel
};

namespace image_detail {

inline std::uint32_t little_endian(const std::vector<std::uint8_t>& data, std::size_t at, int bytes) {
  std::uint32_t value = 0;
  for (int k = bytes - 1; k >= 0; --k) value = value << 8 | data.at(at + k);
  return value;
}

// The next number of a PPM header; comments run from '#' to the end of the line.
inline int header_number(const std::vector<std::uint8_t>& data, std::size_t& at) {
  while (at < data.size() && (std::isspace(data[at]) || data[at] == '#')) {
    if (data[at] == '#') {
      while (at < data.size() && data[at] != '\n') ++at;
    } else {
      ++at;
    }
  }
  long value = 0;
  const std::size_t first = at;
  while (at < data.size() && std::isdigit(data[at]) && value < 1000000) {
    value = 10 * value + (data[at++] - '0');
  }
  if (at == first) throw std::runtime_error("damaged PPM header");
  return static_cast<int>(value);
}

inline Image read_ppm(const std::vector<std::uint8_t>& data) {
  std::size_t at = 2;
  Image image;
  image.width = header_number(data, at);
  image.height = header_number(data, at);
  if (header_number(data, at) != 255) throw std::runtime_error("PPM with other than 8 bits");
  ++at;  // one white space, then the pixels
  const std::size_t size = std::size_t{3} * image.width * image.height;
  if (size == 0 || data.size() < at + size) throw std::runtime_error("PPM is cut short");
  image.rgb.assign(data.begin() + at, data.begin() + at + size);
  return image;
}

inline Image read_bmp(const std::vector<std::uint8_t>& data) {
  if (data.size() < 54) throw std::runtime_error("BMP is cut short");
  const std::size_t pixels = little_endian(data, 10, 4);
  const auto width = static_cast<std::int32_t>(little_endian(data, 18, 4));
  const auto height = static_cast<std::int32_t>(little_endian(data, 22, 4));
  if (little_endian(data, 28, 2) != 24 || little_endian(data, 30, 4) != 0) {
    throw std::runtime_error("BMP is not 24 bit and uncompressed");
  }
  // A negative height means top row first.
  Image image;
  image.width = width;
  image.height = std::abs(height);
  const std::size_t row = (std::size_t{3} * width + 3) / 4 * 4;
  if (width <= 0 || height == 0 || data.size() < pixels + row * image.height) {
    throw std::runtime_error("BMP is cut short");
  }
  image.rgb.resize(std::size_t{3} * width * image.height);
  for (int y = 0; y < image.height; ++y) {
    const std::size_t from = pixels + row * (height > 0 ? image.height - 1 - y : y);
    for (int x = 0; x < width; ++x) {
      for (int c = 0; c < 3; ++c) {
        image.rgb[(std::size_t{1} * y * width + x) * 3 + c] = data[from + 3 * x + (2 - c)];
      }
    }
  }
  return image;
}

}  // namespace image_detail

inline Image read_image(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path + ": cannot be opened");
  const std::vector<std::uint8_t> data{std::istreambuf_iterator<char>(file), {}};
  try {
    if (data.size() > 2 && data[0] == 'P' && data[1] == '6') return image_detail::read_ppm(data);
    if (data.size() > 2 && data[0] == 'B' && data[1] == 'M') return image_detail::read_bmp(data);
    throw std::runtime_error("neither a binary PPM (P6) nor a BMP");
  } catch (const std::exception& error) {
    throw std::runtime_error(path + ": " + error.what());
  }
}
