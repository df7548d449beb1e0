// dump_input IMAGE OUT: writes the prepared input as raw floats (images, valid size, original size),
// to compare with another implementation. Needs no runtime.
#include <cstdio>
#include <exception>
#include <fstream>

#include "preprocess.hpp"

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: %s IMAGE.ppm|IMAGE.bmp OUT\n", argv[0]);
    return 2;
  }
  try {
    const Input input = preprocess(read_image(argv[1]));
    std::ofstream out(argv[2], std::ios::binary);
    const auto write = [&out](const float* data, std::size_t count) {
      out.write(reinterpret_cast<const char*>(data), count * sizeof(float));
    };
    write(input.images.data(), input.images.size());
    write(input.valid_size.data(), 2);
    write(input.original_size.data(), 2);
    if (!out) throw std::runtime_error(std::string(argv[2]) + ": cannot be written");
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}
