// A few channels held in registers: vectors of the width the file is compiled for.
#pragma once

#include "../include/msda.hpp"

#if defined(__F16C__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define MSDA_VECTOR_BYTES 64
#elif defined(__AVX__)
#define MSDA_VECTOR_BYTES 32
#else
#define MSDA_VECTOR_BYTES 16
#endif

namespace detr_msda {
namespace MSDA_TARGET {

#if defined(__GNUC__)

template <class T, int N> struct Vector {
    typedef T type __attribute__((vector_size(N * sizeof(T))));
    typedef T unaligned __attribute__((vector_size(N * sizeof(T)), aligned(alignof(T)), may_alias));
};

template <class T, int N> MSDA_FUNCTION typename Vector<T, N>::type load_raw(const void *from) {
    return *static_cast<const typename Vector<T, N>::unaligned *>(from);
}

template <int N> MSDA_FUNCTION auto widen_vector(const float *from) { return load_raw<float, N>(from); }
template <int N> MSDA_FUNCTION auto widen_vector(const double *from) {
    return load_raw<double, N>(from);
}
template <int N> MSDA_FUNCTION auto widen_vector(const BFloat16 *from) {
    const auto narrow = load_raw<unsigned short, N>(from);
    const auto wide = __builtin_convertvector(narrow, typename Vector<unsigned, N>::type) << 16;
    return reinterpret_cast<typename Vector<float, N>::type>(wide);
}
template <int N> MSDA_FUNCTION auto widen_vector(const Half *from) {
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

template <int N, class V> MSDA_FUNCTION auto sum(V vector) {
    if constexpr (N == 1) {
        return vector[0];
    } else {
        constexpr int half = N / 2;
        using Scalar = decltype(vector[0] + vector[0]);
        typename Vector<Scalar, half>::type low, high;
        __builtin_memcpy(&low, &vector, sizeof(low));
        __builtin_memcpy(&high, reinterpret_cast<const char *>(&vector) + sizeof(low), sizeof(low));
        return sum<half>(low + high);
    }
}

// N channels (a power of two) of accumulator type Acc.
template <class Acc, int N> struct Row {
    using Scalar = Acc;
    static constexpr int kWidth =
        N * sizeof(Acc) <= MSDA_VECTOR_BYTES ? N : MSDA_VECTOR_BYTES / int(sizeof(Acc));
    static constexpr int kCount = N / kWidth;
    using V = typename Vector<Acc, kWidth>::type;
    V part[kCount];

    template <class Value> static MSDA_FUNCTION Row load(const Value *from) {
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
    MSDA_FUNCTION Acc dot(const Row &other) const {
        V total = part[0] * other.part[0];
#pragma GCC unroll 16
        for (int i = 1; i < kCount; ++i) total += part[i] * other.part[i];
        return sum<kWidth>(total);
    }
    template <class Value> MSDA_FUNCTION void store(Value *to) const {
        if constexpr (sizeof(Value) == sizeof(Acc)) {
#pragma GCC unroll 16
            for (int i = 0; i < kCount; ++i) {
                *reinterpret_cast<typename Vector<Acc, kWidth>::unaligned *>(to + i * kWidth) = part[i];
            }
        } else {
            for (int i = 0; i < N; ++i) to[i] = narrow<Value>(Acc(part[i / kWidth][i % kWidth]));
        }
    }
};

#else  // a compiler without vector types: plain arrays, vectorised as far as it can

template <class Acc, int N> struct Row {
    using Scalar = Acc;
    Acc part[N];

    template <class Value> static MSDA_FUNCTION Row load(const Value *from) {
        Row row;
        for (int i = 0; i < N; ++i) row.part[i] = widen(from[i]);
        return row;
    }
    static MSDA_FUNCTION Row zero() { return Row{}; }
    MSDA_FUNCTION void add(Acc scale, const Row &other) {
        for (int i = 0; i < N; ++i) part[i] += scale * other.part[i];
    }
    MSDA_FUNCTION void add(const Row &other) {
        for (int i = 0; i < N; ++i) part[i] += other.part[i];
    }
    MSDA_FUNCTION void add_scaled_to(Acc *sums, Acc scale) const {
        Row row = load(sums);
        row.add(scale, *this);
        row.store(sums);
    }
    MSDA_FUNCTION Acc dot(const Row &other) const {
        Acc total = 0;
        for (int i = 0; i < N; ++i) total += part[i] * other.part[i];
        return total;
    }
    template <class Value> MSDA_FUNCTION void store(Value *to) const {
        for (int i = 0; i < N; ++i) to[i] = narrow<Value>(part[i]);
    }
};

#endif

}  // namespace MSDA_TARGET
}  // namespace detr_msda
