// 3x3 convolution of stride 1 by Winograd's F(2x2, 3x3), for AVX2.
//
// Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv 1509.09308, section 4.1:
// 2x2 outputs come from 4x4 inputs by 16 products instead of 36.
#pragma once

namespace detr_winograd {

// Output channels whose kernels lie beside each other; input channels come in eights.
constexpr long long kPanel = 16, kVector = 8;
constexpr long long kPlaces = 16;  // of a 4x4 tile

enum class Activation { none, relu, silu };

// One call. Maps are [images, height, width, channels]; a border of zeros is thought around them.
struct Problem {
    long long images, height, width, inputs, outputs;
    long long block;  // tiles that are worked on together
    const float *map, *kernels, *bias, *zeros;  // zeros: as many as input channels
    const float *added;  // to the result, before the activation; null for nothing
    Activation activation;
    float *out;
};

// Tiles of 2x2 outputs in one image; those at an odd edge stick out.
static inline long long tiles_of(const Problem &p) {
    return ((p.height + 1) / 2) * ((p.width + 1) / 2);
}

// [outputs, inputs, 3, 3] to [16, outputs / 16, inputs, 16], transformed.
void pack(const float *weights, long long outputs, long long inputs, float *packed);

// Tiles first to first + count of an image. Scratch: 16 * block * (inputs + outputs) floats.
void convolve(const Problem &p, long long image, long long first, long long count, float *scratch);

}  // namespace detr_winograd
