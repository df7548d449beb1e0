// The forward pass of one head whose values are first copied together.
#pragma once

#include "kernels.hpp"
#include "row.hpp"

namespace detr_msda {
namespace MSDA_TARGET {
namespace {

// How far ahead rows to pack and rows of the output are prefetched: enough for memory to answer,
// little enough for the line to be there still. Rows and queries of one head lie too far apart for
// the processor to see the pattern by itself.
constexpr Index kRowsAhead = 16, kOutputsAhead = 4;

// Samples located before their corners are read, of one query at least. This is also how far ahead
// locations and weights are prefetched.
constexpr Index kSamplesAtOnce = 128;

MSDA_FUNCTION void prefetch(const void *from, Index bytes) {
    const char *at = static_cast<const char *>(from);
    for (Index byte = 0; byte < bytes; byte += 64) __builtin_prefetch(at + byte);
}
MSDA_FUNCTION void prefetch_to_write(const void *to, Index bytes) {
    const char *at = static_cast<const char *>(to);
    for (Index byte = 0; byte < bytes; byte += 64) __builtin_prefetch(at + byte, 1);
}

// Copies a head's channels together, each level as packed_cells() describes. Left where they are,
// the rows of one head all fall into the same few cache sets, and next to nothing of them stays in
// cache. Corners outside then need neither a branch, which would be mispredicted too often, nor a
// mask: they are zeros like any other cell.
template <class Value>
void pack(const Problem &p, const Value *values, Value *packed) {
    const Index stride = p.heads * p.channels, bytes = p.channels * Index(sizeof(Value));
    Index left = p.tokens;
    const auto zeros = [&](Index cells) {
        __builtin_memset(packed, 0, cells * bytes);
        packed += cells * p.channels;
    };
    for (Index level = 0; level < p.levels; ++level) {
        const int width = p.widths[level];
        zeros(width + 2);
        for (int line = 0; line < p.heights[level]; ++line) {
            for (int column = 0; column < width; ++column, --left) {
                if (left > kRowsAhead) prefetch(values + kRowsAhead * stride, bytes);
                channel_blocks(p.channels, [&](auto size, Index channel) {
                    __builtin_memcpy(packed + channel, values + channel,
                                     sizeof(Value) * decltype(size)::value);
                });
                values += stride;
                packed += p.channels;
            }
            zeros(1);
        }
        zeros(width + 1);
    }
}

// Bytes of a packed head, rounded up to keep what follows aligned.
template <class Value>
Index packed_bytes(const Problem &p) {
    Index cells = 0;
    for (Index level = 0; level < p.levels; ++level) {
        cells += packed_cells(p.heights[level], p.widths[level]);
    }
    return (cells * p.channels * Index(sizeof(Value)) + 63) / 64 * 64;
}

// The level of each of a query's samples.
struct Levels {
    int width[kMostSamples], height[kMostSamples];
    // Where its packed cells begin and how far the next line is, in bytes.
    unsigned start[kMostSamples], down[kMostSamples];

    void fill(const Problem &p, Index row_bytes) {
        Index begin = 0;
        for (Index level = 0, i = 0; level < p.levels; ++level) {
            for (Index point = 0; point < p.points[level]; ++point, ++i) {
                width[i] = p.widths[level];
                height[i] = p.heights[level];
                start[i] = static_cast<unsigned>(begin * row_bytes);
                down[i] = static_cast<unsigned>((width[i] + 1LL) * row_bytes);
            }
            begin += packed_cells(p.heights[level], p.widths[level]);
        }
    }
};

// Where the corners of samples lie in a packed head, and what they count. The right corner follows
// the left one.
template <class Acc>
struct alignas(64) Located {
    unsigned top[kMostSamples], bottom[kMostSamples];  // left corners, in bytes
    Acc share[4][kMostSamples];                        // in the order of Corners, times the weight

    // N samples of a query, the first its `first`-th, are kept from `to` on.
    template <int N>
    MSDA_FUNCTION void locate_some(const Acc *locations, const Acc *weights, const Levels &levels,
                                   Index first, unsigned row_bytes, Index to) {
        const Acc *__restrict x = locations + 2 * first, *__restrict w = weights + first;
        const int *__restrict width = levels.width + first;
        const int *__restrict height = levels.height + first;
        const unsigned *__restrict start = levels.start + first;
        const unsigned *__restrict down = levels.down + first;
#pragma GCC ivdep
        for (int i = 0; i < N; ++i) {
            const Acc weight = w[i];
            const Place<Acc> at = place(x[2 * i], x[2 * i + 1], height[i], width[i]);
            const unsigned cell = static_cast<unsigned>(at.line + 1) * down[i] +
                                  static_cast<unsigned>(at.column + 1) * row_bytes;
            // Of a sample outside, all corners are in the zeros above its level. With masks, as GCC
            // makes a branch of many choices by `inside` and then does not vectorize.
            const unsigned kept = at.inside ? ~0u : 0u;
            const unsigned left = start[i] + (cell & kept);
            top[to + i] = left;
            bottom[to + i] = left + (down[i] & kept);
            const Acc scale = at.inside ? weight : static_cast<Acc>(0);
            const Corners<Acc> corners = corner_shares(at.fx, at.fy, scale);
            share[0][to + i] = corners.top_left;
            share[1][to + i] = corners.top_right;
            share[2][to + i] = corners.bottom_left;
            share[3][to + i] = corners.bottom_right;
        }
    }
    // All samples of a query, in the widest vectors that its arrays fill. The last ones are located
    // twice where their number is no multiple.
    template <int N = 16>
    MSDA_FUNCTION void locate_query(const Acc *locations, const Acc *weights, const Levels &levels,
                                    Index samples, unsigned row_bytes, Index to) {
        if constexpr (N > 1) {
            if (samples < N) {
                locate_query<N / 2>(locations, weights, levels, samples, row_bytes, to);
                return;
            }
        }
        for (Index i = 0; i < samples; i += N) {
            const Index first = i + N <= samples ? i : samples - N;
            locate_some<N>(locations, weights, levels, first, row_bytes, to + first);
        }
    }
};

// Adds the i-th sample; sums as `accumulate` does.
template <class Part, class Value, class Acc>
MSDA_FUNCTION void accumulate_packed(Part &upper, Part &lower, const Value *values,
                                     Index row_bytes, const Located<Acc> &located, Index i) {
    const char *base = reinterpret_cast<const char *>(values);
    const char *top = base + located.top[i], *bottom = base + located.bottom[i];
    const auto row = [](const char *at) { return Part::load(reinterpret_cast<const Value *>(at)); };
    upper.add(located.share[0][i], row(top));
    lower.add(located.share[2][i], row(bottom));
    upper.add(located.share[1][i], row(top + row_bytes));
    lower.add(located.share[3][i], row(bottom + row_bytes));
}

template <class Value>
Index packed_scratch(const Problem &p) {
    using Acc = typename Accumulator<Value>::type;
    return packed_bytes<Value>(p) + Index(sizeof(Located<Acc>) + sizeof(Levels));
}

template <class Value>
void forward_packed(const Problem &p, const ForwardArrays &arrays, void *scratch,
                    const ForwardUnit &unit) {
    using Acc = typename Accumulator<Value>::type;
    const Index stride = p.heads * p.channels, samples = p.samples;
    const Index row_bytes = p.channels * Index(sizeof(Value));
    Value *packed = static_cast<Value *>(scratch);
    char *free = static_cast<char *>(scratch) + packed_bytes<Value>(p);
    Located<Acc> &located = *reinterpret_cast<Located<Acc> *>(free);
    Levels &levels = *reinterpret_cast<Levels *>(free + sizeof(Located<Acc>));
    pack(p,
         static_cast<const Value *>(arrays.value) + unit.image * p.tokens * stride +
             unit.first_head * p.channels,
         packed);
    levels.fill(p, row_bytes);

    const Index fitting = kSamplesAtOnce / samples, step = fitting > 1 ? fitting : 1;
    const Index query_stride = p.heads * samples;  // of the weights; the locations have twice that
    for (Index query = unit.first_query; query < unit.last_query; query += step) {
        const Index left = unit.last_query - query, queries = left < step ? left : step;
        const Index row = unit.image * p.queries + query;
        const Index first = row * query_stride + unit.first_head * samples;
        const Acc *locations = static_cast<const Acc *>(arrays.locations) + first * 2;
        const Acc *weights = static_cast<const Acc *>(arrays.weights) + first;
        Value *out = static_cast<Value *>(arrays.out) + row * stride + unit.first_head * p.channels;
        for (Index q = 0; q < queries; ++q) {
            const Index skipped = q * query_stride;
            located.locate_query(locations + 2 * skipped, weights + skipped, levels, samples,
                                 static_cast<unsigned>(row_bytes), q * samples);
        }
        for (Index q = 0; q < queries; ++q, out += stride) {
            if (q + step < left) {
                const Index ahead = (q + step) * query_stride;
                prefetch(locations + 2 * ahead, 2 * samples * Index(sizeof(Acc)));
                prefetch(weights + ahead, samples * Index(sizeof(Acc)));
            }
            if (q + kOutputsAhead < left)
                prefetch_to_write(out + kOutputsAhead * stride, row_bytes);
            channel_blocks(p.channels, [&](auto size, Index channel) {
                using Part = Row<Acc, decltype(size)::value>;
                Part upper = Part::zero(), lower = Part::zero();
                for (Index i = q * samples; i < (q + 1) * samples; ++i) {
                    accumulate_packed(upper, lower, packed + channel, row_bytes, located, i);
                }
                upper.add(lower);
                upper.store(out + channel);
            });
        }
    }
}

}  // namespace
}  // namespace MSDA_TARGET
}  // namespace detr_msda
