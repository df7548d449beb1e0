// The forward pass that reads values where they are.
#pragma once

#include "samples.hpp"

namespace detr_msda {
namespace MSDA_TARGET {
namespace {

// Heads of which a query's samples fit.
Index heads_at_once(Index heads, Index samples) {
    const Index fitting = kCapacity / (samples > 0 ? samples : 1);
    return heads < fitting ? heads : fitting;
}

template <class Value>
void forward_in_place(const Problem &p, const ForwardArrays &arrays, void *scratch,
                      const ForwardUnit &unit) {
    using Acc = typename Accumulator<Value>::type;
    const Index stride = p.heads * p.channels, all_heads = unit.last_head - unit.first_head;
    const Value *values = static_cast<const Value *>(arrays.value) +
                          unit.image * p.tokens * stride + unit.first_head * p.channels;
    Samples<Acc> &samples = *static_cast<Samples<Acc> *>(scratch);
    const Index step = heads_at_once(all_heads, p.samples);
    const Index block_queries = queries_per_block(step * p.samples);
    for (Index query_and_head = 0, i = 0; query_and_head < block_queries * step; ++query_and_head) {
        for (Index level = 0; level < p.levels; ++level) {
            for (Index point = 0; point < p.points[level]; ++point, ++i) {
                samples.width[i] = p.widths[level];
                samples.height[i] = p.heights[level];
            }
        }
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
                              p.samples};
            load_block(block, static_cast<const Acc *>(arrays.locations),
                       static_cast<const Acc *>(arrays.weights), samples);
            samples.locate_all(block.count());
            for (Index i = 0, q = 0; q < block.queries; ++q) {
                Value *out = static_cast<Value *>(arrays.out) + (block.query + q) * stride +
                             unit.first_head * p.channels;
                for (Index head = 0; head < heads; ++head, i += p.samples) {
                    const Index column = (first_head - unit.first_head + head) * p.channels;
                    channel_blocks(p.channels, [&](auto width, Index channel) {
                        using Part = Row<Acc, decltype(width)::value>;
                        Part upper = Part::zero(), lower = Part::zero();
                        Index sample = i;
                        for (Index level = 0; level < p.levels; ++level) {
                            const Value *base =
                                values + p.starts[level] * stride + column + channel;
                            const Index down = p.widths[level] * stride;
                            for (Index point = 0; point < p.points[level]; ++point, ++sample) {
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

}  // namespace
}  // namespace MSDA_TARGET
}  // namespace detr_msda
