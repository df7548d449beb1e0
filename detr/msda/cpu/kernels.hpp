// What the module asks of the kernels of one instruction set.
#pragma once

namespace detr_msda {

enum class ValueType { float32, float64, float16, bfloat16 };

// Sizes of one call; arrays are dense and in the order of the torch op's documentation.
struct Problem {
    long long batch, tokens, heads, channels, queries, levels, points;
    const int *heights, *widths;  // per level
    const long long *starts;      // first token of each level
    const int *order;             // per image, in which order to visit its queries

    long long samples() const { return levels * points; }
};

struct ForwardArrays {
    const void *value, *locations, *weights;
    void *out;
};

struct BackwardArrays {
    const void *grad_out, *value, *locations, *weights;
    void *grad_value, *grad_locations, *grad_weights;
};

struct Kernels {
    const char *name;
    // Bytes of scratch one thread needs.
    long long (*forward_scratch)(const Problem &, ValueType);
    long long (*backward_scratch)(const Problem &, ValueType, long long heads);
    // The queries at [begin, end) of `order`.
    void (*forward)(const Problem &, ValueType, const ForwardArrays &, void *scratch, long long begin,
                    long long end);
    // All gradients of one image, one level and the heads [first, last). No two such units write to
    // the same place, and each adds up in the order of the queries: the result has the same bits
    // however the work is shared out.
    void (*backward)(const Problem &, ValueType, const BackwardArrays &, void *scratch,
                     long long image, long long level, long long first, long long last);
};

const Kernels &kernels_baseline();
#if defined(MSDA_X86)
const Kernels &kernels_avx2();
const Kernels &kernels_avx512();
#endif

}  // namespace detr_msda
