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
    const Index count = p.samples(), stride = p.heads * p.channels;
    Samples<Acc> samples(static_cast<char *>(scratch), count);
    for (Index i = 0; i < count; ++i) {
        samples.width[i] = p.widths[i / p.points];
        samples.height[i] = p.heights[i / p.points];
    }
    for (Index query = begin; query < end; ++query) {
        const Value *image = values + query / p.queries * p.tokens * stride;
        for (Index head = 0; head < p.heads; ++head) {
            const Index first = (query * p.heads + head) * count;
#pragma GCC ivdep
            for (Index i = 0; i < count; ++i) {
                samples.x[i] = locations[(first + i) * 2];
                samples.y[i] = locations[(first + i) * 2 + 1];
                samples.weight[i] = weights[first + i];
            }
            samples.locate_all(count);
            const Value *head_values = image + head * p.channels;
            Value *head_out = out + (query * p.heads + head) * p.channels;
            channel_blocks(p.channels, [&](auto width, Index channel) {
                using Block = Row<Acc, decltype(width)::value>;
                Block upper = Block::zero(), lower = Block::zero();
                Index i = 0;
                for (Index level = 0; level < p.levels; ++level) {
                    const Value *base = head_values + p.starts[level] * stride + channel;
                    const Index down = p.widths[level] * stride;
                    for (Index point = 0; point < p.points; ++point, ++i) {
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

// Queries whose samples are located together in the backward pass.
constexpr Index kQueryBlock = 32;

Index level_rows(const Problem &p) {
    Index rows = 0;
    for (Index level = 0; level < p.levels; ++level) {
        const Index size = Index(p.heights[level]) * p.widths[level];
        rows = size > rows ? size : rows;
    }
    return rows;
}

template <class Value>
void backward(const Problem &p, const BackwardArrays &arrays, void *scratch, Index unit) {
    using Acc = typename Accumulator<Value>::type;
    const Index level = unit % p.levels, head = unit / p.levels % p.heads;
    const Index image = unit / p.levels / p.heads;
    const Index stride = p.heads * p.channels, points = p.points;
    const int height = p.heights[level], width = p.widths[level];
    const Index rows = Index(height) * width;
    const Index offset = (image * p.tokens + p.starts[level]) * stride + head * p.channels;
    const Value *values = static_cast<const Value *>(arrays.value) + offset;
    Value *grad_values = static_cast<Value *>(arrays.grad_value) + offset;

    // The unit's gradient, gathered densely and in full precision, then written out once.
    Acc *sums = static_cast<Acc *>(scratch);
    for (Index i = 0; i < rows * p.channels; ++i) sums[i] = 0;
    Corners<Acc> *dots = reinterpret_cast<Corners<Acc> *>(sums + level_rows(p) * p.channels);
    Samples<Acc> samples(reinterpret_cast<char *>(dots + kQueryBlock * points),
                         kQueryBlock * points);
    for (Index i = 0; i < kQueryBlock * points; ++i) {
        samples.width[i] = width;
        samples.height[i] = height;
    }
    for (Index begin = 0; begin < p.queries; begin += kQueryBlock) {
        const Index queries = p.queries - begin < kQueryBlock ? p.queries - begin : kQueryBlock;
        const Index count = queries * points;
        // First sample of query `begin + q` in this head and level: first + q * step.
        const Index step = p.heads * p.samples();
        const Index first = (image * p.queries + begin) * step + head * p.samples() + level * points;
        const Acc *locations = static_cast<const Acc *>(arrays.locations) + first * 2;
        const Acc *weights = static_cast<const Acc *>(arrays.weights) + first;
        for (Index q = 0; q < queries; ++q) {
            for (Index point = 0; point < points; ++point) {
                samples.x[q * points + point] = locations[(q * step + point) * 2];
                samples.y[q * points + point] = locations[(q * step + point) * 2 + 1];
                samples.weight[q * points + point] = weights[q * step + point];
            }
        }
        samples.locate_all(count);
        for (Index q = 0; q < queries; ++q) {
            const Value *grad_out = static_cast<const Value *>(arrays.grad_out) +
                                    ((image * p.queries + begin + q) * p.heads + head) * p.channels;
            for (Index i = q * points; i < (q + 1) * points; ++i) dots[i] = Corners<Acc>{};
            channel_blocks(p.channels, [&](auto block, Index channel) {
                using Block = Row<Acc, decltype(block)::value>;
                const Block gradient = Block::load(grad_out + channel);
                for (Index i = q * points; i < (q + 1) * points; ++i) {
                    const Index row = samples.row[i];
                    const unsigned mask = samples.mask[i];
                    const Corners<Acc> dot =
                        corner_dots(gradient, values + row * stride + channel, stride, width * stride, mask);
                    dots[i].top_left += dot.top_left;
                    dots[i].top_right += dot.top_right;
                    dots[i].bottom_left += dot.bottom_left;
                    dots[i].bottom_right += dot.bottom_right;
                    scatter(gradient, sums + row * p.channels + channel, p.channels,
                            width * p.channels, mask, samples.corners(i));
                }
            });
        }
        Acc *grad_locations = static_cast<Acc *>(arrays.grad_locations) + first * 2;
        Acc *grad_weights = static_cast<Acc *>(arrays.grad_weights) + first;
        for (Index i = 0; i < count; ++i) {
            const SampleGradient<Acc> gradient = sample_gradient(
                dots[i], samples.fx[i], samples.fy[i], samples.weight[i], height, width);
            const Index to = i / points * step + i % points;
            grad_weights[to] = gradient.weight;
            grad_locations[to * 2] = gradient.x;
            grad_locations[to * 2 + 1] = gradient.y;
        }
    }
    for (Index row = 0; row < rows; ++row) {
        channel_blocks(p.channels, [&](auto block, Index channel) {
            Row<Acc, decltype(block)::value>::load(sums + row * p.channels + channel)
                .store(grad_values + row * stride + channel);
        });
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
        return Samples<typename Accumulator<decltype(value)>::type>::kBytes * p.samples();
    });
}

Index backward_scratch(const Problem &p, ValueType type) {
    return with_type(type, [&](auto value) {
        using Acc = typename Accumulator<decltype(value)>::type;
        return (Samples<Acc>::kBytes + Index(sizeof(Corners<Acc>))) * kQueryBlock * p.points +
               level_rows(p) * p.channels * Index(sizeof(Acc));
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
                  Index unit) {
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
    static const Kernels kernels{MSDA_TEXT(MSDA_TARGET), forward_scratch, backward_scratch, run_forward,
                                 run_backward};
    return kernels;
}

}  // namespace detr_msda
