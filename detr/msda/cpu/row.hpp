// A few channels held in registers: vectors of the width the file is compiled for.
#pragma once

#include "../include/msda.hpp"

#if defined(__AVX__)
#include <immintrin.h>
#endif

// Given by a build that wants other vectors than its instruction set has: 4 for none at all.
#if defined(MSDA_VECTOR_BYTES)
#elif defined(__AVX512F__)
#define MSDA_VECTOR_BYTES 64
#elif defined(__AVX__)
#define MSDA_VECTOR_BYTES 32
#else
#define MSDA_VECTOR_BYTES 16
#endif

namespace detr_msda {
namespace MSDA_TARGET {

template <class T, int N>
struct Vector {
    typedef T type __attribute__((vector_size(N * sizeof(T))));
    typedef T unaligned __attribute__((vector_size(N * sizeof(T)), aligned(alignof(T)), may_alias));
};

template <class T, int N>
MSDA_FUNCTION typename Vector<T, N>::type load_raw(const void *from) {
    return *static_cast<const typename Vector<T, N>::unaligned *>(from);
}

template <int N>
MSDA_FUNCTION auto widen_vector(const float *from) {
    return load_raw<float, N>(from);
}
template <int N>
MSDA_FUNCTION auto widen_vector(const double *from) {
    return load_raw<double, N>(from);
}
template <int N>
MSDA_FUNCTION auto widen_vector(const BFloat16 *from) {
    const auto narrow = load_raw<unsigned short, N>(from);
    const auto wide = __builtin_convertvector(narrow, typename Vector<unsigned, N>::type) << 16;
    return reinterpret_cast<typename Vector<float, N>::type>(wide);
}
template <int N>
MSDA_FUNCTION auto widen_vector(const Half *from) {
#if defined(__AVX512F__)
    if constexpr (N == 16) {
        return reinterpret_cast<typename Vector<float, 16>::type>(
            _mm512_cvtph_ps(reinterpret_cast<__m256i>(load_raw<unsigned short, 16>(from))));
    } else
#endif
#if defined(__F16C__)
        if constexpr (N == 8) {
        return reinterpret_cast<typename Vector<float, 8>::type>(
            _mm256_cvtph_ps(reinterpret_cast<__m128i>(load_raw<unsigned short, 8>(from))));
    } else
#endif
    {
        typename Vector<float, N>::type wide;
        for (int i = 0; i < N; ++i) wide[i] = widen(from[i]);
        return wide;
    }
}

template <int N, class V, class Value>
MSDA_FUNCTION void narrow_vector(V wide, Value *to) {
    for (int i = 0; i < N; ++i) to[i] = narrow<Value>(wide[i] + 0);
}
#if defined(__F16C__)
template <int N, class V>
MSDA_FUNCTION void narrow_vector(V wide, Half *to) {
    if constexpr (N == 8) {
        _mm_storeu_si128(
            reinterpret_cast<__m128i *>(to),
            _mm256_cvtps_ph(reinterpret_cast<__m256>(wide), _MM_FROUND_TO_NEAREST_INT));
#if defined(__AVX512F__)
    } else if constexpr (N == 16) {
        _mm256_storeu_si256(
            reinterpret_cast<__m256i *>(to),
            _mm512_cvtps_ph(reinterpret_cast<__m512>(wide), _MM_FROUND_TO_NEAREST_INT));
#endif
    } else {
        for (int i = 0; i < N; ++i) to[i] = narrow<Half>(wide[i] + 0);
    }
}
#endif

template <int N, class V>
MSDA_FUNCTION auto sum(V vector) {
    if constexpr (N == 1) {
        return vector[0];
    } else {
        using Scalar = decltype(vector[0] + vector[0]);
        using Half = typename Vector<Scalar, N / 2>::type;
        Half low, high;
        __builtin_memcpy(&low, &vector, sizeof(low));
        __builtin_memcpy(&high, reinterpret_cast<const char *>(&vector) + sizeof(low), sizeof(low));
        return sum<N / 2>(Half(low + high));
    }
}

// The sums of four vectors. Adding them up together takes half the instructions of one by one.
template <int N, class V, class Acc = decltype(V{}[0] + V{}[0])>
MSDA_FUNCTION Corners<Acc> sums(V a, V b, V c, V d) {
#if defined(__AVX__)
    if constexpr (N == 8 && sizeof(Acc) == 4) {
        const __m256 halves = _mm256_hadd_ps(
            _mm256_hadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)),
            _mm256_hadd_ps(reinterpret_cast<__m256>(c), reinterpret_cast<__m256>(d)));
        return bit_cast<Corners<Acc>>(
            _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
    }
#endif
#if defined(__AVX512F__)
    if constexpr (N == 16 && sizeof(Acc) == 4) {
        const auto fold = [](V vector) {
            const __m512 whole = reinterpret_cast<__m512>(vector);
            return reinterpret_cast<typename Vector<float, 8>::type>(
                _mm256_add_ps(_mm512_castps512_ps256(whole), _mm512_extractf32x8_ps(whole, 1)));
        };
        return sums<8>(fold(a), fold(b), fold(c), fold(d));
    }
#endif
    return {sum<N>(a), sum<N>(b), sum<N>(c), sum<N>(d)};
}

// N channels (a power of two) of accumulator type Acc.
template <class Acc, int N>
struct Row {
    using Scalar = Acc;
    static constexpr int kMostWidth =
        MSDA_VECTOR_BYTES > sizeof(Acc) ? MSDA_VECTOR_BYTES / int(sizeof(Acc)) : 1;
    static constexpr int kWidth = N < kMostWidth ? N : kMostWidth;
    static constexpr int kCount = N / kWidth;
    using V = typename Vector<Acc, kWidth>::type;
    V part[kCount];

    template <class Value>
    static MSDA_FUNCTION Row load(const Value *from) {
        Row row;
#pragma GCC unroll 16
        for (int i = 0; i < kCount; ++i) row.part[i] = widen_vector<kWidth>(from + i * kWidth);
        return row;
    }
    static MSDA_FUNCTION Row zero() {
        Row row;
#pragma GCC unroll 16
        for (int i = 0; i < kCount; ++i) row.part[i] = V{};
        return row;
    }
    MSDA_FUNCTION void add(Acc scale, const Row &other) {
#pragma GCC unroll 16
        for (int i = 0; i < kCount; ++i) part[i] += scale * other.part[i];
    }
    MSDA_FUNCTION void add(const Row &other) {
#pragma GCC unroll 16
        for (int i = 0; i < kCount; ++i) part[i] += other.part[i];
    }
    MSDA_FUNCTION void add_scaled_to(Acc *sums, Acc scale) const {
        Row row = load(sums);
        row.add(scale, *this);
        row.store(sums);
    }
    MSDA_FUNCTION V products(const Row &other) const {
        V total = part[0] * other.part[0];
#pragma GCC unroll 16
        for (int i = 1; i < kCount; ++i) total += part[i] * other.part[i];
        return total;
    }
    MSDA_FUNCTION Acc dot(const Row &other) const { return sum<kWidth>(products(other)); }
    MSDA_FUNCTION Corners<Acc> dots(const Row &a, const Row &b, const Row &c, const Row &d) const {
        return sums<kWidth>(products(a), products(b), products(c), products(d));
    }
    template <class Value>
    MSDA_FUNCTION void store(Value *to) const {
        if constexpr (sizeof(Value) == sizeof(Acc)) {
#pragma GCC unroll 16
            for (int i = 0; i < kCount; ++i) {
                *reinterpret_cast<typename Vector<Acc, kWidth>::unaligned *>(to + i * kWidth) =
                    part[i];
            }
        } else {
#pragma GCC unroll 16
            for (int i = 0; i < kCount; ++i) narrow_vector<kWidth>(part[i], to + i * kWidth);
        }
    }
};

template <int N>
struct Width {
    static constexpr int value = N;
};

// Calls visit(Width<N>, first channel) for blocks of 64, 32, ... 1 channels that cover all.
template <int N, class Visit>
MSDA_FUNCTION Index blocks_of(Index channel, Index channels, Visit visit) {
    for (; channel + N <= channels; channel += N) visit(Width<N>{}, channel);
    return channel;
}
template <class Visit>
MSDA_FUNCTION void channel_blocks(Index channels, Visit visit) {
    Index channel = blocks_of<64>(0, channels, visit);
    channel = blocks_of<32>(channel, channels, visit);
    channel = blocks_of<16>(channel, channels, visit);
    channel = blocks_of<8>(channel, channels, visit);
    channel = blocks_of<4>(channel, channels, visit);
    channel = blocks_of<2>(channel, channels, visit);
    blocks_of<1>(channel, channels, visit);
}

}  // namespace MSDA_TARGET
}  // namespace detr_msda
