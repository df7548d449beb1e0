// Samples located a block of queries at a time, for values read where they are.
#pragma once

#include "kernels.hpp"
#include "row.hpp"

namespace detr_msda {
namespace MSDA_TARGET {
namespace {

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

// A block of queries in some heads, each with the same `run` of samples out of its p.samples.
struct Block {
    const Problem &p;
    Index query, queries, first_head, heads, first_sample, run;

    Index count() const { return queries * heads * run; }
    // Calls visit(sample in the problem, sample in the block) for each (query, head), in order.
    template <class Visit>
    MSDA_FUNCTION void each_run(Visit visit) const {
        Index to = 0;
        for (Index q = 0; q < queries; ++q) {
            Index from = ((query + q) * p.heads + first_head) * p.samples + first_sample;
            for (Index head = 0; head < heads; ++head, from += p.samples, to += run)
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

}  // namespace
}  // namespace MSDA_TARGET
}  // namespace detr_msda
