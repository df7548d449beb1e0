// Compiled for AVX2: no standard library templates here, as their instances would be shared with
// code that must run anywhere.
#include "kernel.hpp"

namespace detr_winograd {
namespace {

using Index = long long;
typedef float Vector __attribute__((vector_size(32), aligned(4)));

// Rows of the product held in registers: 6 x 2 sums of the 16 there are.
constexpr int kRows = 6;

Vector load(const float *from) { return *reinterpret_cast<const Vector *>(from); }
void store(float *to, Vector x) { *reinterpret_cast<Vector *>(to) = x; }

// rows x 16 of a product: a [rows, depth], kernels [depth, 16], out with a row of `stride`.
template <int rows>
void product(const float *a, Index depth, const float *kernels, float *out, Index stride) {
    Vector left[rows] = {}, right[rows] = {};
    for (Index k = 0; k < depth; ++k) {
        const Vector b0 = load(kernels + k * kPanel), b1 = load(kernels + k * kPanel + kVector);
#pragma GCC unroll 6
        for (int i = 0; i < rows; ++i) {
            const float x = a[i * depth + k];
            const Vector all = {x, x, x, x, x, x, x, x};
            left[i] += all * b0;
            right[i] += all * b1;
        }
    }
    for (int i = 0; i < rows; ++i) {
        store(out + i * stride, left[i]);
        store(out + i * stride + kVector, right[i]);
    }
}

// [count, inputs] x [inputs, outputs] at one of the 16 places.
void multiply(const float *a, Index count, Index inputs, const float *kernels, Index outputs,
              float *out) {
    for (Index n = 0; n < outputs; n += kPanel, kernels += inputs * kPanel) {
        Index t = 0;
        for (; t + kRows <= count; t += kRows) {
            product<kRows>(a + t * inputs, inputs, kernels, out + t * outputs + n, outputs);
        }
        a += t * inputs;
        float *rest = out + t * outputs + n;
        switch (count - t) {
            case 5: product<5>(a, inputs, kernels, rest, outputs); break;
            case 4: product<4>(a, inputs, kernels, rest, outputs); break;
            case 3: product<3>(a, inputs, kernels, rest, outputs); break;
            case 2: product<2>(a, inputs, kernels, rest, outputs); break;
            case 1: product<1>(a, inputs, kernels, rest, outputs); break;
            default: break;
        }
        a -= t * inputs;
    }
}

// One 4x4 tile of inputs to its 16 places, `step` floats apart.
void spread(const Problem &p, const float *image, Index row, Index column, float *to, Index step) {
    const float *cells[kPlaces];
    for (int i = 0; i < 4; ++i) {
        for (int j = 0; j < 4; ++j) {
            const Index y = 2 * row - 1 + i, x = 2 * column - 1 + j;
            const bool inside = y >= 0 && y < p.height && x >= 0 && x < p.width;
            cells[i * 4 + j] = inside ? image + (y * p.width + x) * p.inputs : p.zeros;
        }
    }
    for (Index c = 0; c < p.inputs; c += kVector) {
        Vector half[4][4];
        for (int j = 0; j < 4; ++j) {
            const Vector d0 = load(cells[j] + c), d1 = load(cells[4 + j] + c);
            const Vector d2 = load(cells[8 + j] + c), d3 = load(cells[12 + j] + c);
            half[0][j] = d0 - d2;
            half[1][j] = d1 + d2;
            half[2][j] = d2 - d1;
            half[3][j] = d1 - d3;
        }
        for (int i = 0; i < 4; ++i) {
            float *place = to + i * 4 * step + c;
            store(place, half[i][0] - half[i][2]);
            store(place + step, half[i][1] + half[i][2]);
            store(place + 2 * step, half[i][2] - half[i][1]);
            store(place + 3 * step, half[i][1] - half[i][3]);
        }
    }
}

// e to the power of each value: a power of two times a series on [-0.35, 0.35].
Vector exponential(Vector x) {
    typedef int Integers __attribute__((vector_size(32)));
    x = x < -87.0f ? Vector{} - 87.0f : x > 87.0f ? Vector{} + 87.0f : x;
    // Adding and taking away 1.5 * 2^23 rounds to a whole number.
    const Vector whole = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
    const Vector rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    Vector sum = Vector{} + 1.0f / 5040;
    const float terms[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    for (const float term : terms) sum = sum * rest + term;
    const Integers power = (__builtin_convertvector(whole, Integers) + 127) << 23;
    return sum * (Vector)power;  // the same bits
}

// One vector of the result, at `place` of the map.
void finish(const Problem &p, Vector x, Index place) {
    if (p.added != nullptr) x += load(p.added + place);
    if (p.activation == Activation::relu) x = x > 0.0f ? x : Vector{};
    if (p.activation == Activation::silu) x = x / (1.0f + exponential(-x));
    store(p.out + place, x);
}

// The 16 places of a tile to its 2x2 outputs, less those that stick out; `first` is the image's.
void gather(const Problem &p, const float *from, Index step, Index row, Index column, Index first) {
    const bool below = 2 * row + 1 < p.height, beside = 2 * column + 1 < p.width;
    const Index out = first + (2 * row * p.width + 2 * column) * p.outputs;
    const Index line = p.width * p.outputs;
    for (Index c = 0; c < p.outputs; c += kVector) {
        Vector half[2][4];
        for (int j = 0; j < 4; ++j) {
            const float *place = from + j * step + c;
            const Vector m0 = load(place), m1 = load(place + 4 * step);
            const Vector m2 = load(place + 8 * step), m3 = load(place + 12 * step);
            half[0][j] = m0 + m1 + m2;
            half[1][j] = m1 - m2 - m3;
        }
        const Vector bias = load(p.bias + c);
        for (int i = 0; i < (below ? 2 : 1); ++i) {
            const Vector *h = half[i];
            finish(p, h[0] + h[1] + h[2] + bias, out + i * line + c);
            if (beside) finish(p, h[1] - h[2] - h[3] + bias, out + i * line + p.outputs + c);
        }
    }
}

// Three values of a kernel's row or column to four.
void widen(const float from[3], float to[4]) {
    to[0] = from[0];
    to[1] = 0.5f * (from[0] + from[1] + from[2]);
    to[2] = 0.5f * (from[0] - from[1] + from[2]);
    to[3] = from[2];
}

}  // namespace

void pack(const float *weights, Index outputs, Index inputs, float *packed) {
    for (Index n = 0; n < outputs; ++n) {
        for (Index k = 0; k < inputs; ++k, weights += 9) {
            float columns[3][4], rows[4][4];
            for (int j = 0; j < 3; ++j) {
                const float column[3] = {weights[j], weights[3 + j], weights[6 + j]};
                widen(column, columns[j]);
            }
            for (int i = 0; i < 4; ++i) {
                const float row[3] = {columns[0][i], columns[1][i], columns[2][i]};
                widen(row, rows[i]);
            }
            float *to = packed + (n / kPanel * inputs + k) * kPanel + n % kPanel;
            for (int place = 0; place < kPlaces; ++place) {
                to[place * outputs * inputs] = rows[place / 4][place % 4];
            }
        }
    }
}

void convolve(const Problem &p, Index image, Index first, Index count, float *scratch) {
    const Index across = (p.width + 1) / 2;
    const float *map = p.map + image * p.height * p.width * p.inputs;
    const Index out = image * p.height * p.width * p.outputs;
    float *spreads = scratch, *products = scratch + kPlaces * p.block * p.inputs;
    const Index in_step = p.block * p.inputs, out_step = p.block * p.outputs;
    for (Index t = 0; t < count; ++t) {
        const Index tile = first + t;
        spread(p, map, tile / across, tile % across, spreads + t * p.inputs, in_step);
    }
    for (Index place = 0; place < kPlaces; ++place) {
        multiply(spreads + place * in_step, count, p.inputs,
                 p.kernels + place * p.inputs * p.outputs, p.outputs, products + place * out_step);
    }
    for (Index t = 0; t < count; ++t) {
        const Index tile = first + t;
        gather(p, products + t * p.outputs, out_step, tile / across, tile % across, out);
    }
}

}  // namespace detr_winograd
