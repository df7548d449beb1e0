// The backward pass.
#pragma once

#include "samples.hpp"

namespace detr_msda {
namespace MSDA_TARGET {
namespace {

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
    const Index points = p.points[unit.level], heads = unit.last_head - unit.first_head;
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
                          p.firsts[unit.level],
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

}  // namespace
}  // namespace MSDA_TARGET
}  // namespace detr_msda
