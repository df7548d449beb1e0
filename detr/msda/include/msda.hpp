// The arithmetic of multi-scale deformable attention, forward and backward, written once for the
// CPU (C++17) and for CUDA (nvcc and NVRTC).
//
//   out[b, q, m, :] = sum over levels v and points p of
//                     weight[b, q, m, v, p] * bilinear(value[b, level v, m, :], location[b, q, m,
//                     v, p])
//
// Locations are (x, y) in [0, 1] of the level; texel centers lie at (i + 0.5) / size (grid_sample's
// align_corners=False) and everything outside a level is zero. Source: Zhu et al., "Deformable
// DETR", arXiv 2010.04159, equation 3.
//
// Values may be stored in half precision. Coordinates, weights and sums are always float (double
// for double values): in half precision the coordinate grid of a 156-column map is an eighth of a
// cell.
#pragma once

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define MSDA_CUDA
#define MSDA_FUNCTION __host__ __device__ __forceinline__
#else
#define MSDA_FUNCTION inline __attribute__((always_inline))
#endif

// Each instruction set's build lives in its own namespace: the linker would otherwise merge equal
// template instances and hand AVX-512 code to a machine without it.
#ifndef MSDA_TARGET
#define MSDA_TARGET generic
#endif

namespace detr_msda {
namespace MSDA_TARGET {

using Index = long long;

struct Half {
    unsigned short bits;
};
struct BFloat16 {
    unsigned short bits;
};

// Type of coordinates, weights and sums for a type of stored values.
template <class Value>
struct Accumulator {
    using type = float;
};
template <>
struct Accumulator<double> {
    using type = double;
};

template <class To, class From>
MSDA_FUNCTION To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
    To to;
#if defined(__CUDA_ARCH__)
    memcpy(&to, &from, sizeof(To));
#else
    __builtin_memcpy(&to, &from, sizeof(To));
#endif
    return to;
}

MSDA_FUNCTION float fused(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
    return fmaf(a, b, c);
#elif defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}
MSDA_FUNCTION double fused(double a, double b, double c) {
#if !defined(__CUDA_ARCH__) && (defined(__FMA__) || defined(__ARM_FEATURE_FMA))
    // Left to the compiler, some of its versions of a loop would round twice and others once.
    return __builtin_fma(a, b, c);
#else
    return a * b + c;
#endif
}

MSDA_FUNCTION float widen(float value) { return value; }
MSDA_FUNCTION double widen(double value) { return value; }
MSDA_FUNCTION float widen(BFloat16 value) {
    return bit_cast<float>(static_cast<unsigned>(value.bits) << 16);
}
MSDA_FUNCTION float widen(Half value) {
#if defined(__CUDA_ARCH__)
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
#else
    // No subnormal float on the way: training tells the processor to take those for zero.
    const unsigned magnitude = value.bits & 0x7fffu;
    const unsigned sign = static_cast<unsigned>(value.bits & 0x8000u) << 16;
    const unsigned special = magnitude >= 0x7c00u ? 0x38000000u : 0u;  // infinity and NaN
    const unsigned normal = (magnitude << 13) + 0x38000000u + special;
    const float subnormal = static_cast<float>(static_cast<int>(magnitude)) * 0x1p-24f;
    return bit_cast<float>(
        (magnitude < 0x0400u ? bit_cast<unsigned>(subnormal) : normal) | sign);
#endif
}

template <class Value, class Acc>
MSDA_FUNCTION Value narrow(Acc value) {
    return static_cast<Value>(value);
}
template <>
MSDA_FUNCTION BFloat16 narrow<BFloat16, float>(float value) {
    const unsigned bits = bit_cast<unsigned>(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return BFloat16{static_cast<unsigned short>((bits >> 16) | 0x40u)};  // keep NaN a NaN
    }
    return BFloat16{static_cast<unsigned short>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
template <>
MSDA_FUNCTION Half narrow<Half, float>(float value) {
#if defined(__CUDA_ARCH__)
    unsigned short result;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result) : "f"(value));
    return Half{result};
#else
    const unsigned bits = bit_cast<unsigned>(value);
    const unsigned sign = (bits >> 16) & 0x8000u;
    const unsigned magnitude = bits & 0x7fffffffu;
    unsigned half;
    if (magnitude > 0x7f800000u) {
        half = 0x7e00u;
    } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
        half = 0x7c00u;
    } else if (magnitude < 0x38800000u) {  // subnormal half: float addition does the rounding
        half = bit_cast<unsigned>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    } else {
        half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    }
    return Half{static_cast<unsigned short>(sign | half)};
#endif
}

// Where one sample falls among the cells of its level.
template <class Acc>
struct Place {
    bool inside;       // less than a cell outside at most; otherwise all that follows is 0
    int column, line;  // of the top left corner, from -1 on
    Acc fx, fy;        // share of the right and of the bottom corners
};

// Places (x, y) in a level. Far away, infinite and NaN coordinates are not inside. No branches, so
// that a loop over samples vectorizes.
template <class Acc>
MSDA_FUNCTION Place<Acc> place(Acc x, Acc y, int height, int width) {
    const Acc w = static_cast<Acc>(width), h = static_cast<Acc>(height);
    const Acc half = static_cast<Acc>(0.5), zero = static_cast<Acc>(0), low = static_cast<Acc>(-1);
    const Acc u = fused(x, w, -half), v = fused(y, h, -half);
    const bool inside = (u >= low) & (u < w) & (v >= low) & (v < h);
    const Acc safe_u = inside ? u : zero, safe_v = inside ? v : zero;
    int column = static_cast<int>(safe_u), line = static_cast<int>(safe_v);
    column -= safe_u < static_cast<Acc>(column) ? 1 : 0;
    line -= safe_v < static_cast<Acc>(line) ? 1 : 0;
    // One rounding of x * w - 0.5 - column, and not that of the larger x * w - 0.5.
    const Acc fx = fused(x, w, -(half + static_cast<Acc>(column)));
    const Acc fy = fused(y, h, -(half + static_cast<Acc>(line)));
    return {inside, column, line, inside ? fx : zero, inside ? fy : zero};
}

// Where one sample falls among the rows of its level.
template <class Acc>
struct Sample {
    int row;  // top left corner, counted in rows of the level (may lie outside)
    unsigned
        mask;    // which corners are inside: 1 top left, 2 top right, 4 bottom left, 8 bottom right
    Acc fx, fy;  // share of the right and of the bottom corners
};

constexpr unsigned kAllCorners = 15u;

// Locates (x, y) in a level; the mask is empty where it is not inside.
template <class Acc>
MSDA_FUNCTION Sample<Acc> locate(Acc x, Acc y, int height, int width) {
    const Place<Acc> at = place(x, y, height, width);
    const unsigned left = at.column >= 0 ? 5u : 0u, right = at.column + 1 < width ? 10u : 0u;
    const unsigned top = at.line >= 0 ? 3u : 0u, bottom = at.line + 1 < height ? 12u : 0u;
    return {at.line * width + at.column, at.inside ? (left | right) & (top | bottom) : 0u, at.fx,
            at.fy};
}

// Bilinear shares of the four corners, times `scale`.
template <class Acc>
struct Corners {
    Acc top_left, top_right, bottom_left, bottom_right;
};
template <class Acc>
MSDA_FUNCTION Corners<Acc> corner_shares(Acc fx, Acc fy, Acc scale) {
    const Acc one = static_cast<Acc>(1);
    const Acc top = (one - fy) * scale, bottom = fy * scale;
    return {top * (one - fx), top * fx, bottom * (one - fx), bottom * fx};
}

// Gradients of one sample with respect to its weight and location, from the scalar products of the
// output's gradient with the four corners (zero for corners outside).
template <class Acc>
struct SampleGradient {
    Acc weight, x, y;
};
template <class Acc>
MSDA_FUNCTION SampleGradient<Acc> sample_gradient(Corners<Acc> dot, Acc fx, Acc fy, Acc weight,
                                                  int height, int width) {
    const Acc one = static_cast<Acc>(1);
    const Acc top = dot.top_left + fx * (dot.top_right - dot.top_left);
    const Acc bottom = dot.bottom_left + fx * (dot.bottom_right - dot.bottom_left);
    const Acc along_x =
        (one - fy) * (dot.top_right - dot.top_left) + fy * (dot.bottom_right - dot.bottom_left);
    return {top + fy * (bottom - top), weight * static_cast<Acc>(width) * along_x,
            weight * static_cast<Acc>(height) * (bottom - top)};
}

#if defined(MSDA_CUDA)
// A corner's channels, zeros where it is outside. One predicated load: the samples of a warp differ
// in which corners are inside, so that a separate way for those with all four would make nearly
// every warp go both ways, one after the other.
template <class Row, class Value>
MSDA_FUNCTION Row load_if(unsigned inside, const Value *corner) {
    return inside ? Row::load(corner) : Row::zero();
}
#else
// Keeps the compiler from folding a pointer into something else that it knows. Two uses: corners
// that are pointers of their own make shorter instructions than base plus index, and a second
// pointer to the shares lets the usual path load each share where it is used.
#define MSDA_OPAQUE(pointer) asm("" : "+r"(pointer))
#endif

// Adds one sample to two running sums of `Row` (a few channels in registers): two, because the
// upper and the lower pair of corners then form separate chains of dependent additions. `corner`
// points at the top left corner's channels; `stride` is one row, `down` one line, in values. The
// shares of the corners lie `step` apart at `share`: top left, top right, bottom left, bottom
// right.
template <class Row, class Value, class Acc>
MSDA_FUNCTION void accumulate(Row &upper, Row &lower, const Value *corner, Index stride, Index down,
                              unsigned mask, const Acc *share, Index step) {
#if defined(MSDA_CUDA)
    const Row top_left = load_if<Row>(mask & 1u, corner);
    const Row top_right = load_if<Row>(mask & 2u, corner + stride);
    const Row bottom_left = load_if<Row>(mask & 4u, corner + down);
    const Row bottom_right = load_if<Row>(mask & 8u, corner + down + stride);
    upper.add(share[0], top_left);
    lower.add(share[2 * step], bottom_left);
    upper.add(share[step], top_right);
    lower.add(share[3 * step], bottom_right);
#else
    if (mask == kAllCorners) {
        const Value *top_right = corner + stride, *bottom_left = corner + down;
        const Value *bottom_right = bottom_left + stride;
        MSDA_OPAQUE(top_right);
        MSDA_OPAQUE(bottom_left);
        MSDA_OPAQUE(bottom_right);
        upper.add(share[0], Row::load(corner));
        lower.add(share[2 * step], Row::load(bottom_left));
        upper.add(share[step], Row::load(top_right));
        lower.add(share[3 * step], Row::load(bottom_right));
    } else if (mask != 0u) {
        MSDA_OPAQUE(share);
        if (mask & 1u) upper.add(share[0], Row::load(corner));
        if (mask & 2u) upper.add(share[step], Row::load(corner + stride));
        if (mask & 4u) lower.add(share[2 * step], Row::load(corner + down));
        if (mask & 8u) lower.add(share[3 * step], Row::load(corner + down + stride));
    }
#endif
}

// Scalar products of `gradient` with the corners of one sample.
template <class Row, class Value>
MSDA_FUNCTION Corners<typename Row::Scalar> corner_dots(const Row &gradient, const Value *corner,
                                                        Index stride, Index down, unsigned mask) {
#if defined(MSDA_CUDA)
    return gradient.dots(load_if<Row>(mask & 1u, corner), load_if<Row>(mask & 2u, corner + stride),
                         load_if<Row>(mask & 4u, corner + down),
                         load_if<Row>(mask & 8u, corner + down + stride));
#else
    Corners<typename Row::Scalar> dot{};
    if (mask == kAllCorners) {
        dot = gradient.dots(Row::load(corner), Row::load(corner + stride), Row::load(corner + down),
                            Row::load(corner + down + stride));
    } else if (mask != 0u) {
        if (mask & 1u) dot.top_left = gradient.dot(Row::load(corner));
        if (mask & 2u) dot.top_right = gradient.dot(Row::load(corner + stride));
        if (mask & 4u) dot.bottom_left = gradient.dot(Row::load(corner + down));
        if (mask & 8u) dot.bottom_right = gradient.dot(Row::load(corner + down + stride));
    }
    return dot;
#endif
}

// Adds the gradient, times the corners' shares, to the corners of one sample in `sums`.
template <class Row, class Acc>
MSDA_FUNCTION void scatter(const Row &gradient, Acc *sums, Index stride, Index down, unsigned mask,
                           Corners<Acc> share) {
    if (mask & 1u) gradient.add_scaled_to(sums, share.top_left);
    if (mask & 2u) gradient.add_scaled_to(sums + stride, share.top_right);
    if (mask & 4u) gradient.add_scaled_to(sums + down, share.bottom_left);
    if (mask & 8u) gradient.add_scaled_to(sums + down + stride, share.bottom_right);
}

}  // namespace MSDA_TARGET
}  // namespace detr_msda
