// The CPU kernels. Compiled once per instruction set with MSDA_TARGET naming it; no standard
// library templates here, as their instances would be shared between the builds.
#include "kernels.hpp"

#include "row.hpp"

namespace detr_msda {
namespace MSDA_TARGET {
namespace {

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

// Samples located at once: many, because locating has a long latency and is done in whole vectors;
// few enough to stay in the first cache. The module refuses problems with more of them per head.
constexpr Index kCapacity = kMostSamples;

// Located samples, one array per quantity, at distances known at compile time.
template <class Acc>
struct alignas(64) Samples {
    Acc x[kCapacity], y[kCapacity], weight[kCapacity];
    Acc fx[kCapacity], fy[kCapacity];
    Acc share[4][kCapacity];  // of the corners, times weight
    int row[kCapacity], width[kCapacity], height[kCapacity];
    unsigned mask[kCapacity];
    unsigned start[kCapacity];      // first token of the level
    unsigned corner[4][kCapacity];  // byte offsets, in the order of `share`

    void locate_all(Index count) {
#pragma GCC ivdep
        for (Index i = 0; i < count; ++i) {
            const Sample<Acc> sample = locate(x[i], y[i], height[i], width[i]);
            const Corners<Acc> corners = corner_shares(sample.fx, sample.fy, weight[i]);
            row[i] = sample.row;
            mask[i] = sample.mask;
            fx[i] = sample.fx;
            fy[i] = sample.fy;
            share[0][i] = corners.top_left;
            share[1][i] = corners.top_right;
            share[2][i] = corners.bottom_left;
            share[3][i] = corners.bottom_right;
        }
    }
    // For packed values of `row_bytes` a token: one offset per corner, that of `zero_row` for the
    // corners outside. Without a branch: which corners are inside is too irregular to predict.
    void locate_packed(Index count, unsigned row_bytes, unsigned zero_row) {
        const Acc zero = static_cast<Acc>(0);
#pragma GCC ivdep
        for (Index i = 0; i < count; ++i) {
            const Sample<Acc> sample = locate(x[i], y[i], height[i], width[i]);
            const Corners<Acc> corners = corner_shares(sample.fx, sample.fy, weight[i]);
            const unsigned top = start[i] + static_cast<unsigned>(sample.row);
            const unsigned bottom = top + static_cast<unsigned>(width[i]);
            const unsigned mask = sample.mask;
            corner[0][i] = (mask & 1u ? top : zero_row) * row_bytes;
            corner[1][i] = (mask & 2u ? top + 1u : zero_row) * row_bytes;
            corner[2][i] = (mask & 4u ? bottom : zero_row) * row_bytes;
            corner[3][i] = (mask & 8u ? bottom + 1u : zero_row) * row_bytes;
            share[0][i] = mask & 1u ? corners.top_left : zero;
            share[1][i] = mask & 2u ? corners.top_right : zero;
            share[2][i] = mask & 4u ? corners.bottom_left : zero;
            share[3][i] = mask & 8u ? corners.bottom_right : zero;
        }
    }
    Corners<Acc> corners(Index i) const {
        return {share[0][i], share[1][i], share[2][i], share[3][i]};
    }
};

// About as many samples as are located together.
constexpr Index kSampleBlock = 256;

// Queries located together in a unit that takes `samples` of each.
Index queries_per_block(Index samples) {
    const Index queries = kSampleBlock / (samples > 0 ? samples : 1);
    return queries > 1 ? queries : 1;
}

// Heads of which a query's samples fit.
Index heads_at_once(Index heads, Index samples) {
    const Index fitting = kCapacity / (samples > 0 ? samples : 1);
    return heads < fitting ? heads : fitting;
}

// A block of queries in some heads, each with the same `run` of samples out of its p.samples().
struct Block {
    const Problem &p;
    Index query, queries, first_head, heads, first_sample, run;

    Index count() const { return queries * heads * run; }
    // Starts loading what the q-th query from here has in `array`. With one head at a time, the
    // queries lie too far apart for the processor to see the pattern by itself.
    MSDA_FUNCTION void prefetch(Index q, const void *array, Index sample_bytes) const {
        const Index from = ((query + q) * p.heads + first_head) * p.samples() + first_sample;
        const char *at = static_cast<const char *>(array) + from * sample_bytes;
        for (Index byte = 0; byte < run * sample_bytes; byte += 64) __builtin_prefetch(at + byte);
    }
    // Calls visit(sample in the problem, sample in the block) for each (query, head), in order.
    template <class Visit>
    MSDA_FUNCTION void each_run(Visit visit) const {
        Index to = 0;
        for (Index q = 0; q < queries; ++q) {
            Index from = ((query + q) * p.heads + first_head) * p.samples() + first_sample;
            for (Index head = 0; head < heads; ++head, from += p.samples(), to += run)
                visit(from, to);
        }
    }
};

template <class Acc>
void load_block(const Block &block, const Acc *locations, const Acc *weights,
                Samples<Acc> &samples) {
    block.each_run([&](Index from, Index to) {
#pragma GCC ivdep
        for (Index i = 0; i < block.run; ++i) {
            samples.x[to + i] = locations[(from + i) * 2];
            samples.y[to + i] = locations[(from + i) * 2 + 1];
            samples.weight[to + i] = weights[from + i];
        }
    });
}

// Rows ahead that packing prefetches: they lie too far apart for the processor to do so by itself.
constexpr Index kRowsAhead = 16;

// Copies the channels of some heads together, [tokens][columns] at `packed`, and a row of zeros
// after them. Left where they are, the rows of one head all fall into the same few cache sets, and
// next to nothing of them stays in cache.
template <class Value>
void pack(const Problem &p, const Value *values, Index columns, Value *packed) {
    const Index stride = p.heads * p.channels;
    for (Index token = 0; token < p.tokens; ++token) {
        const Value *from = values + token * stride;
        Value *to = packed + token * columns;
        if (token + kRowsAhead < p.tokens) {
            const char *ahead = reinterpret_cast<const char *>(from + kRowsAhead * stride);
            const Index bytes = columns * Index(sizeof(Value));
            for (Index byte = 0; byte < bytes; byte += 64) __builtin_prefetch(ahead + byte);
        }
        channel_blocks(columns, [&](auto width, Index column) {
            __builtin_memcpy(to + column, from + column, sizeof(Value) * decltype(width)::value);
        });
    }
    __builtin_memset(packed + p.tokens * columns, 0, sizeof(Value) * columns);
}

// Bytes of so many packed heads, rounded up to keep what follows aligned.
template <class Value>
Index packed_bytes(const Problem &p, Index heads) {
    return ((p.tokens + 1) * heads * p.channels * Index(sizeof(Value)) + 63) / 64 * 64;
}

// Adds the i-th sample of packed values; sums as in `accumulate`.
template <class Part, class Value, class Acc>
MSDA_FUNCTION void accumulate_packed(Part &upper, Part &lower, const Value *values,
                                     const Samples<Acc> &samples, Index i) {
    const char *base = reinterpret_cast<const char *>(values);
    const auto row = [&](int corner) {
        return Part::load(reinterpret_cast<const Value *>(base + samples.corner[corner][i]));
    };
    upper.add(samples.share[0][i], row(0));
    lower.add(samples.share[2][i], row(2));
    upper.add(samples.share[1][i], row(1));
    lower.add(samples.share[3][i], row(3));
}

template <class Value>
void forward(const Problem &p, const ForwardArrays &arrays, void *scratch,
             const ForwardUnit &unit) {
    using Acc = typename Accumulator<Value>::type;
    const Index row = p.heads * p.channels, all_heads = unit.last_head - unit.first_head;
    const Value *values = static_cast<const Value *>(arrays.value) + unit.image * p.tokens * row +
                          unit.first_head * p.channels;
    Index stride = row;
    char *free = static_cast<char *>(scratch);
    if (unit.packed) {
        Value *packed = static_cast<Value *>(scratch);
        stride = all_heads * p.channels;
        pack(p, values, stride, packed);
        values = packed;
        free += packed_bytes<Value>(p, all_heads);
    }
    Samples<Acc> &samples = *reinterpret_cast<Samples<Acc> *>(free);
    const Index step = heads_at_once(all_heads, p.samples());
    const Index block_queries = queries_per_block(step * p.samples());
    for (Index i = 0; i < block_queries * step * p.samples(); ++i) {
        samples.width[i] = p.widths[i % p.samples() / p.points];
        samples.height[i] = p.heights[i % p.samples() / p.points];
        samples.start[i] = static_cast<unsigned>(p.starts[i % p.samples() / p.points]);
    }
    for (Index first_head = unit.first_head; first_head < unit.last_head; first_head += step) {
        const Index heads = unit.last_head - first_head < step ? unit.last_head - first_head : step;
        for (Index query = unit.first_query; query < unit.last_query; query += block_queries) {
            const Index left = unit.last_query - query;
            const Block block{p,
                              unit.image * p.queries + query,
                              left < block_queries ? left : block_queries,
                              first_head,
                              heads,
                              0,
                              p.samples()};
            load_block(block, static_cast<const Acc *>(arrays.locations),
                       static_cast<const Acc *>(arrays.weights), samples);
            if (unit.packed) {
                samples.locate_packed(block.count(), static_cast<unsigned>(stride * sizeof(Value)),
                                      static_cast<unsigned>(p.tokens));
            } else {
                samples.locate_all(block.count());
            }
            for (Index i = 0, q = 0; q < block.queries; ++q) {
                Value *out = static_cast<Value *>(arrays.out) + (block.query + q) * row +
                             unit.first_head * p.channels;
                if (unit.packed && q + block_queries < left) {
                    block.prefetch(q + block_queries, arrays.locations, 2 * sizeof(Acc));
                    block.prefetch(q + block_queries, arrays.weights, sizeof(Acc));
                }
                for (Index head = 0; head < heads; ++head, i += p.samples()) {
                    const Index column = (first_head - unit.first_head + head) * p.channels;
                    channel_blocks(p.channels, [&](auto width, Index channel) {
                        using Part = Row<Acc, decltype(width)::value>;
                        Part upper = Part::zero(), lower = Part::zero();
                        Index sample = i;
                        if (unit.packed) {
                            for (; sample < i + p.samples(); ++sample) {
                                accumulate_packed(upper, lower, values + column + channel, samples,
                                                  sample);
                            }
                        }
                        for (Index level = 0; !unit.packed && level < p.levels; ++level) {
                            const Value *base =
                                values + p.starts[level] * stride + column + channel;
                            const Index down = p.widths[level] * stride;
                            for (Index point = 0; point < p.points; ++point, ++sample) {
                                accumulate(upper, lower, base + samples.row[sample] * stride,
                                           stride, down, samples.mask[sample],
                                           &samples.share[0][sample], kCapacity);
                            }
                        }
                        upper.add(lower);
                        upper.store(out + column + channel);
                    });
                }
            }
        }
    }
}

Index largest_level(const Problem &p) {
    Index rows = 0;
    for (Index level = 0; level < p.levels; ++level) {
        const Index size = Index(p.heights[level]) * p.widths[level];
        rows = size > rows ? size : rows;
    }
    return rows;
}

// Where a unit adds up the gradient of its values: half precision needs a wider copy.
template <class Value>
constexpr bool kSumsInPlace = sizeof(Value) >= sizeof(float);

template <class Value>
void backward(const Problem &p, const BackwardArrays &arrays, void *scratch,
              const BackwardUnit &unit) {
    using Acc = typename Accumulator<Value>::type;
    const Index points = p.points, heads = unit.last_head - unit.first_head;
    const Index width_of_unit = heads * p.channels, stride = p.heads * p.channels;
    const int height = p.heights[unit.level], width = p.widths[unit.level];
    const Index rows = Index(height) * width;
    const Index offset =
        (unit.image * p.tokens + p.starts[unit.level]) * stride + unit.first_head * p.channels;
    const Value *values = static_cast<const Value *>(arrays.value) + offset;
    Value *grad_values = static_cast<Value *>(arrays.grad_value) + offset;

    const Index block_queries = queries_per_block(heads * points);
    Samples<Acc> &samples = *static_cast<Samples<Acc> *>(scratch);
    Corners<Acc> *dots = reinterpret_cast<Corners<Acc> *>(&samples + 1);
    for (Index i = 0; i < block_queries * heads * points; ++i) {
        samples.width[i] = width;
        samples.height[i] = height;
    }
    Acc *sums = reinterpret_cast<Acc *>(dots + kCapacity);
    Index sums_stride = width_of_unit;
    if constexpr (kSumsInPlace<Value>) {
        sums = grad_values;
        sums_stride = stride;
    }
    for (Index row = 0; row < rows; ++row) {
        for (Index i = 0; i < width_of_unit; ++i) sums[row * sums_stride + i] = 0;
    }

    for (Index query = 0; query < p.queries; query += block_queries) {
        const Index left = p.queries - query;
        const Block block{p,
                          unit.image * p.queries + query,
                          left < block_queries ? left : block_queries,
                          unit.first_head,
                          heads,
                          unit.level * points,
                          points};
        load_block(block, static_cast<const Acc *>(arrays.locations),
                   static_cast<const Acc *>(arrays.weights), samples);
        samples.locate_all(block.count());
        for (Index i = 0; i < block.count(); ++i) dots[i] = Corners<Acc>{};
        for (Index i = 0, q = 0; q < block.queries; ++q) {
            const Value *grad_out = static_cast<const Value *>(arrays.grad_out) +
                                    (block.query + q) * stride + unit.first_head * p.channels;
            for (Index head = 0; head < heads; ++head, i += points) {
                channel_blocks(p.channels, [&](auto size, Index channel) {
                    using Part = Row<Acc, decltype(size)::value>;
                    const Index column = head * p.channels + channel;
                    const Part gradient = Part::load(grad_out + column);
                    for (Index s = i; s < i + points; ++s) {
                        const Index row = samples.row[s];
                        const unsigned mask = samples.mask[s];
                        const Corners<Acc> dot = corner_dots(
                            gradient, values + row * stride + column, stride, width * stride, mask);
                        dots[s].top_left += dot.top_left;
                        dots[s].top_right += dot.top_right;
                        dots[s].bottom_left += dot.bottom_left;
                        dots[s].bottom_right += dot.bottom_right;
                        scatter(gradient, sums + row * sums_stride + column, sums_stride,
                                width * sums_stride, mask, samples.corners(s));
                    }
                });
            }
        }
        Acc *grad_locations = static_cast<Acc *>(arrays.grad_locations);
        Acc *grad_weights = static_cast<Acc *>(arrays.grad_weights);
        block.each_run([&](Index to, Index from) {
            for (Index i = 0; i < points; ++i) {
                const SampleGradient<Acc> gradient =
                    sample_gradient(dots[from + i], samples.fx[from + i], samples.fy[from + i],
                                    samples.weight[from + i], height, width);
                grad_weights[to + i] = gradient.weight;
                grad_locations[(to + i) * 2] = gradient.x;
                grad_locations[(to + i) * 2 + 1] = gradient.y;
            }
        });
    }
    if constexpr (!kSumsInPlace<Value>) {
        for (Index row = 0; row < rows; ++row) {
            channel_blocks(width_of_unit, [&](auto size, Index column) {
                Row<Acc, decltype(size)::value>::load(sums + row * sums_stride + column)
                    .store(grad_values + row * stride + column);
            });
        }
    }
}

// Runs body(Value{}) for the value type of a call.
template <class Body>
auto with_type(ValueType type, Body body) {
    switch (type) {
        case ValueType::float64:
            return body(double{});
        case ValueType::float16:
            return body(Half{});
        case ValueType::bfloat16:
            return body(BFloat16{});
        default:
            return body(float{});
    }
}

Index forward_scratch(const Problem &p, ValueType type, Index packed_heads) {
    return with_type(type, [&](auto value) {
        using Acc = typename Accumulator<decltype(value)>::type;
        return Index(sizeof(Samples<Acc>)) + packed_bytes<decltype(value)>(p, packed_heads);
    });
}

Index backward_scratch(const Problem &p, ValueType type, Index heads) {
    return with_type(type, [&](auto value) {
        using Acc = typename Accumulator<decltype(value)>::type;
        const Index sums =
            kSumsInPlace<decltype(value)> ? 0 : largest_level(p) * heads * p.channels;
        return Index(sizeof(Samples<Acc>)) + Index(sizeof(Corners<Acc>)) * kCapacity +
               sums * Index(sizeof(Acc));
    });
}

void run_forward(const Problem &p, ValueType type, const ForwardArrays &arrays, void *scratch,
                 const ForwardUnit &unit) {
    with_type(type, [&](auto value) {
        forward<decltype(value)>(p, arrays, scratch, unit);
        return 0;
    });
}

void run_backward(const Problem &p, ValueType type, const BackwardArrays &arrays, void *scratch,
                  const BackwardUnit &unit) {
    with_type(type, [&](auto value) {
        backward<decltype(value)>(p, arrays, scratch, unit);
        return 0;
    });
}

}  // namespace
}  // namespace MSDA_TARGET

#define MSDA_TEXT_OF(name) #name
#define MSDA_TEXT(name) MSDA_TEXT_OF(name)
#define MSDA_JOIN_OF(a, b) a##b
#define MSDA_JOIN(a, b) MSDA_JOIN_OF(a, b)

const Kernels &MSDA_JOIN(kernels_, MSDA_TARGET)() {
    using namespace MSDA_TARGET;
    static const Kernels kernels{MSDA_TEXT(MSDA_TARGET), forward_scratch, backward_scratch,
                                 run_forward, run_backward};
    return kernels;
}

}  // namespace detr_msda
