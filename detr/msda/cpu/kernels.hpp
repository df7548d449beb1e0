// What the module asks of the kernels of one instruction set.
#pragma once

namespace detr_msda {

// Samples a query may have in one head, of all levels together.
constexpr long long kMostSamples = 512;
// Cells in a row or column of a level. Beyond this float skips whole numbers, and a location just
// inside could round to a cell outside.
constexpr long long kMostCells = 1LL << 24;
// Tokens of an image: rows are counted in an int.
constexpr long long kMostTokens = (1LL << 31) - 1;

// Cells of a packed level: a line of zeros above it and one below, and one cell of zeros after each
// line, which is the border to the right of that line and to the left of the next. Every corner of
// a sample that lies within a cell of the level is one of them.
static constexpr long long packed_cells(int height, int width) {
    return (height + 2LL) * (width + 1LL) + 1;
}

enum class ValueType { float32, float64, float16, bfloat16 };

// Sizes of one call; arrays are dense and in the order of the torch op's documentation.
struct Problem {
    long long batch, tokens, heads, channels, queries, levels;
    long long samples;            // of a query in one head
    const int *heights, *widths;  // per level
    const long long *starts;      // first token of each level
    const long long *points;      // samples of each level
    const long long *firsts;      // first sample of each level
};

// A part of the forward pass: some heads and queries of one image.
struct ForwardUnit {
    long long image, first_head, last_head, first_query, last_query;
    // Copy the values together first; of one head alone, and its cells take less than 2^32 bytes.
    bool packed;
};

// All gradients of one image and level and some heads. No two such units write to the same place,
// and each adds up in the order of the queries: the result has the same bits however work is shared
// out.
struct BackwardUnit {
    long long image, level, first_head, last_head;
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
    // Bytes of scratch a thread needs, in the backward pass for units of so many heads, which may
    // have kMostSamples samples of one level between them.
    long long (*forward_scratch)(const Problem &, ValueType, bool packed);
    long long (*backward_scratch)(const Problem &, ValueType, long long heads);
    void (*forward)(const Problem &, ValueType, const ForwardArrays &, void *scratch,
                    const ForwardUnit &);
    void (*backward)(const Problem &, ValueType, const BackwardArrays &, void *scratch,
                     const BackwardUnit &);
};

const Kernels &kernels_baseline();
#if defined(MSDA_X86)
const Kernels &kernels_avx2();
const Kernels &kernels_avx512();
#endif

}  // namespace detr_msda
