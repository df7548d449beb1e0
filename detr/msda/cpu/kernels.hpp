// What the module asks of the kernels of one instruction set.
#pragma once

namespace detr_msda {

enum class ValueType { float32, float64, float16, bfloat16 };

// Sizes of one call; arrays are dense and in the order of the torch op's documentation.
struct Problem {
    long long batch, tokens, heads, channels, queries, levels, points;
    const int *heights, *widths;  // per level
    const long long *starts;      // first token of each level

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
    long long (*backward_scratch)(const Problem &, ValueType);
    // Queries [begin, end) of batch * queries.
    void (*forward)(const Problem &, ValueType, const ForwardArrays &, void *scratch, long long begin,
                    long long end);
    // One unit of batch * heads * levels: a unit owns its part of all three gradients, so the result
    // does not depend on the number of threads.
    void (*backward)(const Problem &, ValueType, const BackwardArrays &, void *scratch, long long unit);
};

const Kernels &kernels_baseline();
#if defined(MSDA_X86)
const Kernels &kernels_avx2();
const Kernels &kernels_avx512();
#endif

}  // namespace detr_msda
