// The CPU kernels. Compiled once per instruction set with MSDA_TARGET naming it; no standard library
// templates here, as their instances would be shared between the builds.
#include "kernels.hpp"

#include "row.hpp"

namespace detr_msda {
namespace MSDA_TARGET {
namespace {

template <int N> struct Width {
    static constexpr int value = N;
};

// Calls visit(Width<N>, first channel) for blocks of 64, 32, ... 1 channels that cover all.
template <int N, class Visit>
MSDA_FUNCTION Index blocks_of(Index channel, Index channels, Visit visit) {
    for (; channel + N <= channels; channel += N) visit(Width<N>{}, channel);
    return channel;
}
template <class Visit> MSDA_FUNCTION void channel_blocks(Index channels, Visit visit) {
    Index channel = blocks_of<64>(0, channels, visit);
    channel = blocks_of<32>(channel, channels, visit);
    channel = blocks_of<16>(channel, channels, visit);
    channel = blocks_of<8>(channel, channels, visit);
    channel = blocks_of<4>(channel, channels, visit);
    channel = blocks_of<2>(channel, channels, visit);
    blocks_of<1>(channel, channels, visit);
}

// Located samples, one array per quantity, in the caller's scratch memory.
template <class Acc> struct Samples {
    Acc *x, *y, *weight;
    Acc *fx, *fy;
    Acc *top_left, *top_right, *bottom_left, *bottom_right;  // shares times weight
    int *row, *width, *height;
    unsigned *mask;
    static constexpr Index kBytes = 9 * sizeof(Acc) + 4 * sizeof(int);

    Samples(char *scratch, Index count) {
        Acc *acc = reinterpret_cast<Acc *>(scratch);
        Acc **arrays[] = {&x, &y, &weight, &fx, &fy, &top_left, &top_right, &bottom_left, &bottom_right};
        for (Acc **array : arrays) {
            *array = acc;
            acc += count;
        }
        row = reinterpret_cast<int *>(acc);
        width = row + count;
        height = width + count;
        mask = reinterpret_cast<unsigned *>(height + count);
    }

    void locate_all(Index count) {
#pragma GCC ivdep
        for (Index i = 0; i < count; ++i) {
            const Sample<Acc> sample = locate(x[i], y[i], height[i], width[i]);
            const Corners<Acc> share = corner_shares(sample.fx, sample.fy, weight[i]);
            row[i] = sample.row;
            mask[i] = sample.mask;
            fx[i] = sample.fx;
            fy[i] = sample.fy;
            top_left[i] = share.top_left;
            top_right[i] = share.top_right;
            bottom_left[i] = share.bottom_left;
            bottom_right[i] = share.bottom_right;
        }
    }
    Corners<Acc> corners(Index i) const {
        return {top_left[i], top_right[i], bottom_left[i], bottom_right[i]};
    }
};

template <class Value> void forward(const Problem &p, const ForwardArrays &arrays, void *scratch,
                                    Index begin, Index end) {
    using Acc = typename Accumulator<Value>::type;
    const Value *values = static_cast<const Value *>(arrays.value);
    const Acc *locations = static_cast<const Acc *>(arrays.locations);
    const Acc *weights = static_cast<const Acc *>(arrays.weights);
    Value *out = static_cast<Value *>(arrays.out);
    const Index stride = p.heads * p.channels, count = p.heads * p.samples();
    Samples<Acc> samples(static_cast<char *>(scratch), count);
    for (Index i = 0; i < count; ++i) {
        samples.width[i] = p.widths[i % p.samples() / p.points];
        samples.height[i] = p.heights[i % p.samples() / p.points];
    }
    for (Index position = begin; position < end; ++position) {
        const Index batch = position / p.queries;
        const Index query = batch * p.queries + p.order[position];
        // All heads' samples at once: locating has a long latency, which then is paid once.
#pragma GCC ivdep
        for (Index i = 0; i < count; ++i) {
            samples.x[i] = locations[(query * count + i) * 2];
            samples.y[i] = locations[(query * count + i) * 2 + 1];
            samples.weight[i] = weights[query * count + i];
        }
        samples.locate_all(count);
        const Value *image = values + batch * p.tokens * stride;
        for (Index head = 0; head < p.heads; ++head) {
            Value *head_out = out + query * stride + head * p.channels;
            channel_blocks(p.channels, [&](auto width, Index channel) {
                using Block = Row<Acc, decltype(width)::value>;
                Block upper = Block::zero(), lower = Block::zero();
                Index i = head * p.samples();
                for (Index level = 0; level < p.levels; ++level) {
                    const Value *base =
                        image + p.starts[level] * stride + head * p.channels + channel;
                    const Index down = p.widths[level] * stride;
                    for (Index point = 0; point < p.points; ++point, ++i) {
#ifdef MSDA_PREFETCH
                        const Index a = i + MSDA_PREFETCH;
                        const Value *next = base + samples.row[a] * stride + p.channels*MSDA_PREFETCH/16;
                        for (Index c = 0; c < decltype(width)::value; c += 64 / Index(sizeof(Value))) {
                            __builtin_prefetch(next + c);
                            __builtin_prefetch(next + stride + c);
                            __builtin_prefetch(next + down + c);
                            __builtin_prefetch(next + down + stride + c);
                        }
#endif
                        accumulate(upper, lower, base + samples.row[i] * stride, stride, down,
                                   samples.mask[i], samples.corners(i));
                    }
                }
                upper.add(lower);
                upper.store(head_out + channel);
            });
        }
    }
}

// Samples located together in the backward pass, about; a multiple of any vector's length.
constexpr Index kSampleBlock = 256;

Index queries_per_block(const Problem &p, Index heads) {
    const Index queries = kSampleBlock / (heads * p.points > 0 ? heads * p.points : 1);
    return queries > 1 ? queries : 1;
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
template <class Value> constexpr bool kSumsInPlace = sizeof(Value) >= sizeof(float);

template <class Value>
void backward(const Problem &p, const BackwardArrays &arrays, void *scratch, Index image, Index level,
              Index first_head, Index last_head) {
    using Acc = typename Accumulator<Value>::type;
    const Index points = p.points, heads = last_head - first_head, width_of_unit = heads * p.channels;
    const Index stride = p.heads * p.channels;
    const int height = p.heights[level], width = p.widths[level];
    const Index rows = Index(height) * width;
    const Index offset = (image * p.tokens + p.starts[level]) * stride + first_head * p.channels;
    const Value *values = static_cast<const Value *>(arrays.value) + offset;
    Value *grad_values = static_cast<Value *>(arrays.grad_value) + offset;

    const Index block = queries_per_block(p, heads);
    const Index capacity = block * heads * points;
    Corners<Acc> *dots = static_cast<Corners<Acc> *>(scratch);
    Samples<Acc> samples(reinterpret_cast<char *>(dots + capacity), capacity);
    for (Index i = 0; i < capacity; ++i) {
        samples.width[i] = width;
        samples.height[i] = height;
    }
    Acc *sums = reinterpret_cast<Acc *>(samples.mask + capacity);
    Index sums_stride = width_of_unit;
    if constexpr (kSumsInPlace<Value>) {
        sums = grad_values;
        sums_stride = stride;
    }
    for (Index row = 0; row < rows; ++row) {
        for (Index i = 0; i < width_of_unit; ++i) sums[row * sums_stride + i] = 0;
    }

    for (Index begin = 0; begin < p.queries; begin += block) {
        const Index queries = p.queries - begin < block ? p.queries - begin : block;
        // Head h of query q has its samples at arrays + (q * p.heads + h) * p.samples().
        const Index first =
            ((image * p.queries + begin) * p.heads + first_head) * p.samples() + level * points;
        const Acc *locations = static_cast<const Acc *>(arrays.locations) + first * 2;
        const Acc *weights = static_cast<const Acc *>(arrays.weights) + first;
        Acc *grad_locations = static_cast<Acc *>(arrays.grad_locations) + first * 2;
        Acc *grad_weights = static_cast<Acc *>(arrays.grad_weights) + first;
        const Value *grad_out = static_cast<const Value *>(arrays.grad_out) +
                                (image * p.queries + begin) * stride + first_head * p.channels;
        Index i = 0;
        for (Index q = 0; q < queries; ++q) {
            for (Index head = 0; head < heads; ++head) {
                const Index at = (q * p.heads + head) * p.samples();
                for (Index point = 0; point < points; ++point, ++i) {
                    samples.x[i] = locations[(at + point) * 2];
                    samples.y[i] = locations[(at + point) * 2 + 1];
                    samples.weight[i] = weights[at + point];
                    dots[i] = Corners<Acc>{};
                }
            }
        }
        samples.locate_all(i);
        i = 0;
        for (Index q = 0; q < queries; ++q) {
            for (Index head = 0; head < heads; ++head, i += points) {
                channel_blocks(p.channels, [&](auto size, Index channel) {
                    using Block = Row<Acc, decltype(size)::value>;
                    const Index column = head * p.channels + channel;
                    const Block gradient = Block::load(grad_out + q * stride + column);
                    for (Index s = i; s < i + points; ++s) {
                        const Index row = samples.row[s];
                        const unsigned mask = samples.mask[s];
                        const Corners<Acc> dot = corner_dots(gradient, values + row * stride + column,
                                                             stride, width * stride, mask);
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
        i = 0;
        for (Index q = 0; q < queries; ++q) {
            for (Index head = 0; head < heads; ++head) {
                const Index at = (q * p.heads + head) * p.samples();
                for (Index point = 0; point < points; ++point, ++i) {
                    const SampleGradient<Acc> gradient = sample_gradient(
                        dots[i], samples.fx[i], samples.fy[i], samples.weight[i], height, width);
                    grad_weights[at + point] = gradient.weight;
                    grad_locations[(at + point) * 2] = gradient.x;
                    grad_locations[(at + point) * 2 + 1] = gradient.y;
                }
            }
        }
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
template <class Body> auto with_type(ValueType type, Body body) {
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

Index forward_scratch(const Problem &p, ValueType type) {
    return with_type(type, [&](auto value) {
        return Samples<typename Accumulator<decltype(value)>::type>::kBytes * p.heads * p.samples();
    });
}

Index backward_scratch(const Problem &p, ValueType type, Index heads) {
    return with_type(type, [&](auto value) {
        using Acc = typename Accumulator<decltype(value)>::type;
        const Index samples = queries_per_block(p, heads) * heads * p.points;
        const Index sums = kSumsInPlace<decltype(value)> ? 0 : largest_level(p) * heads * p.channels;
        return samples * (Samples<Acc>::kBytes + Index(sizeof(Corners<Acc>))) + sums * Index(sizeof(Acc));
    });
}

void run_forward(const Problem &p, ValueType type, const ForwardArrays &arrays, void *scratch,
                 Index begin, Index end) {
    with_type(type, [&](auto value) {
        forward<decltype(value)>(p, arrays, scratch, begin, end);
        return 0;
    });
}

void run_backward(const Problem &p, ValueType type, const BackwardArrays &arrays, void *scratch,
                  Index image, Index level, Index first_head, Index last_head) {
    with_type(type, [&](auto value) {
        backward<decltype(value)>(p, arrays, scratch, image, level, first_head, last_head);
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
    static const Kernels kernels{MSDA_TEXT(MSDA_TARGET), forward_scratch, backward_scratch, run_forward,
                                 run_backward};
    return kernels;
}

}  // namespace detr_msda
