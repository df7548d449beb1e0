// The CUDA kernels, forward and backward, for nvcc and NVRTC (no standard headers).
//
// Compiled for one kind of attention, given by macros:
//   MSDA_VALUE                   type of the values: float, double, Half or BFloat16
//   MSDA_HEADS, MSDA_CHANNELS    M and D
//   MSDA_LEVELS, MSDA_SAMPLES    V, and the samples of a query in one head
//   MSDA_POINTS                  P where it is the same on every level, otherwise
//   MSDA_LEVEL_POINTS            P of each level: 3, 6, 3
//   MSDA_SIZES                   optional: {height, width}, ... of each level; otherwise the last
//                                argument of each kernel
//   MSDA_LANE_CHANNELS           channels per thread, a divisor of D (loads of 16 bytes at best)
//   MSDA_LANES                   threads per head: a power of two, at least D / MSDA_LANE_CHANNELS
//   MSDA_THREADS                 threads per block
//   MSDA_FORWARD_ONLY            optional: leave the backward kernel out
//
// One block serves kGroups neighboring (image, query, head) triples. First its threads locate the
// samples of all of them, each sample once; then MSDA_LANES threads per triple read the corners.
#include "msda.hpp"

namespace detr_msda {
namespace MSDA_TARGET {

using Value = MSDA_VALUE;
using Acc = Accumulator<Value>::type;

constexpr int kHeads = MSDA_HEADS, kChannels = MSDA_CHANNELS;
constexpr int kLevels = MSDA_LEVELS, kSamples = MSDA_SAMPLES;
constexpr int kLaneChannels = MSDA_LANE_CHANNELS, kLanes = MSDA_LANES;
constexpr int kThreads = MSDA_THREADS, kGroups = kThreads / kLanes;
constexpr Index kStride = Index(kHeads) * kChannels;
// Places of a triple in shared memory. An odd number: the triples of a warp read the same sample of
// theirs at the same time, and so find it in different banks.
constexpr int kSlots = kSamples | 1;

static_assert(kChannels % kLaneChannels == 0, "each thread takes the same number of channels");
static_assert(kLanes * kLaneChannels >= kChannels, "too few threads for a head");
static_assert(kLanes <= 32 && (kLanes & (kLanes - 1)) == 0, "a head's threads are part of a warp");

struct Level {
    int height, width;
};
struct Levels {
    Level at[kLevels];
};

#if defined(MSDA_SIZES)
#define MSDA_LEVELS_ARGUMENT
#define MSDA_LEVELS_VALUE constexpr Levels levels{{MSDA_SIZES}};
#else
#define MSDA_LEVELS_ARGUMENT , const Levels levels
#define MSDA_LEVELS_VALUE
#endif

// The channels of one thread.
struct Lane {
    using Scalar = Acc;
    struct alignas(sizeof(Value) * kLaneChannels) Packed {
        Value at[kLaneChannels];
    };
    Acc part[kLaneChannels];

    static MSDA_FUNCTION Lane zero() {
        Lane lane;
#pragma unroll
        for (int i = 0; i < kLaneChannels; ++i) lane.part[i] = 0;
        return lane;
    }
    static MSDA_FUNCTION Lane load(const Value *from) {
        const Packed packed = *reinterpret_cast<const Packed *>(from);
        Lane lane;
#pragma unroll
        for (int i = 0; i < kLaneChannels; ++i) lane.part[i] = widen(packed.at[i]);
        return lane;
    }
    MSDA_FUNCTION void add(Acc scale, const Lane &other) {
#pragma unroll
        for (int i = 0; i < kLaneChannels; ++i) part[i] += scale * other.part[i];
    }
    MSDA_FUNCTION Acc dot(const Lane &other) const {
        Acc total = 0;
#pragma unroll
        for (int i = 0; i < kLaneChannels; ++i) total += part[i] * other.part[i];
        return total;
    }
    MSDA_FUNCTION Corners<Acc> dots(const Lane &a, const Lane &b, const Lane &c,
                                    const Lane &d) const {
        return {dot(a), dot(b), dot(c), dot(d)};
    }
    MSDA_FUNCTION void store(Value *to) const {
        Packed packed;
#pragma unroll
        for (int i = 0; i < kLaneChannels; ++i) packed.at[i] = narrow<Value>(part[i]);
        *reinterpret_cast<Packed *>(to) = packed;
    }
    __device__ __forceinline__ void add_scaled_to(Acc *sums, Acc scale) const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && MSDA_LANE_CHANNELS % 4 == 0
        if constexpr (sizeof(Acc) == 4) {
#pragma unroll
            for (int i = 0; i < kLaneChannels; i += 4) {
                atomicAdd(reinterpret_cast<float4 *>(sums + i),
                          make_float4(scale * part[i], scale * part[i + 1], scale * part[i + 2],
                                      scale * part[i + 3]));
            }
        } else
#endif
        {
#pragma unroll
            for (int i = 0; i < kLaneChannels; ++i) atomicAdd(sums + i, scale * part[i]);
        }
    }
};

// Sizes of a level chosen at run time, without the detour through memory of a run-time index.
MSDA_FUNCTION Level level_at(const Levels &levels, int level) {
    Level chosen = levels.at[0];
#pragma unroll
    for (int v = 1; v < kLevels; ++v) {
        chosen.height = v == level ? levels.at[v].height : chosen.height;
        chosen.width = v == level ? levels.at[v].width : chosen.width;
    }
    return chosen;
}

// The level of one of a query's samples.
MSDA_FUNCTION int level_of(int sample) {
#if defined(MSDA_LEVEL_POINTS)
    constexpr int points[kLevels] = {MSDA_LEVEL_POINTS};
    int level = 0, end = 0;
#pragma unroll
    for (int v = 0; v + 1 < kLevels; ++v) {
        end += points[v];
        level += sample >= end ? 1 : 0;
    }
    return level;
#else
    return sample / MSDA_POINTS;
#endif
}

// A located sample in shared memory, with all that reading its corners takes; aligned for loads of
// eight bytes.
struct alignas(8) Staged {
    Corners<Acc> share;
    int token;            // top left corner, counted from the image's first token
    unsigned width_mask;  // the level's width above the four bits of the corner mask

    MSDA_FUNCTION unsigned mask() const { return width_mask & kAllCorners; }
    MSDA_FUNCTION Index down() const { return Index(width_mask >> 4) * kStride; }
};
struct StagedGradient {
    Acc x, y, weight;  // first the shares and the weight, then their gradients
};

// A location, read and written at once.
struct alignas(2 * sizeof(Acc)) Point {
    Acc x, y;
};

// Place in shared memory of the block's i-th sample.
MSDA_FUNCTION int slot_of(int i) { return i / kSamples * kSlots + i % kSamples; }

// Locates the samples of the block's groups, `first` being the first; calls keep(slot, sample,
// weight).
template <class Keep>
__device__ __forceinline__ void stage(const Acc *__restrict__ locations,
                                      const Acc *__restrict__ weights, int first, int groups,
                                      const Levels &levels, Staged *staged, Keep keep) {
    for (int i = threadIdx.x; i < kGroups * kSamples; i += kThreads) {
        const Index at = Index(first) * kSamples + i;
        if (at >= Index(groups) * kSamples) break;
        const int level = level_of(i % kSamples);
        int start = 0;
#pragma unroll
        for (int v = 0; v < kLevels; ++v) {
            start += v < level ? levels.at[v].height * levels.at[v].width : 0;
        }
        const Level size = level_at(levels, level);
        const Point point = reinterpret_cast<const Point *>(locations)[at];
        const Sample<Acc> sample = locate(point.x, point.y, size.height, size.width);
        const Acc weight = weights[at];
        const int slot = slot_of(i);
        staged[slot] = {corner_shares(sample.fx, sample.fy, weight), start + sample.row,
                        static_cast<unsigned>(size.width) << 4 | sample.mask};
        keep(slot, sample, weight);
    }
}

MSDA_FUNCTION Index tokens_of(const Levels &levels) {
    Index tokens = 0;
#pragma unroll
    for (int v = 0; v < kLevels; ++v) tokens += Index(levels.at[v].height) * levels.at[v].width;
    return tokens;
}

// groups = images * queries * heads; grid: one block per kGroups of them.
extern "C" __global__ void __launch_bounds__(kThreads)
    msda_forward(const Value *__restrict__ value, const Acc *__restrict__ locations,
                 const Acc *__restrict__ weights, int queries, int groups,
                 Value *__restrict__ out MSDA_LEVELS_ARGUMENT) {
    MSDA_LEVELS_VALUE
    __shared__ Staged staged[kGroups * kSlots];
    const int first = blockIdx.x * kGroups;
    stage(locations, weights, first, groups, levels, staged, [](int, const Sample<Acc> &, Acc) {});
    __syncthreads();

    const int local = threadIdx.x / kLanes, channel = threadIdx.x % kLanes * kLaneChannels;
    const int group = first + local;
    if (group >= groups || channel >= kChannels) return;
    const Index image = group / kHeads / queries;
    const Value *base =
        value + image * tokens_of(levels) * kStride + group % kHeads * kChannels + channel;
    Lane upper = Lane::zero(), lower = Lane::zero();
#pragma unroll 4
    for (int i = 0; i < kSamples; ++i) {
        const Staged sample = staged[local * kSlots + i];
        accumulate(upper, lower, base + sample.token * kStride, kStride, sample.down(),
                   sample.mask(), &sample.share.top_left, 1);
    }
    upper.add(1, lower);
    upper.store(out + Index(group) * kChannels + channel);
}

#if !defined(MSDA_FORWARD_ONLY)
// grad_value holds sums (float for half precision values) and starts as zeros. Its additions are
// atomic, so their order, and with it the last bits, differ from run to run.
extern "C" __global__ void __launch_bounds__(kThreads)
    msda_backward(const Value *__restrict__ grad_out, const Value *__restrict__ value,
                  const Acc *__restrict__ locations, const Acc *__restrict__ weights, int queries,
                  int groups, Acc *__restrict__ grad_value, Acc *__restrict__ grad_locations,
                  Acc *__restrict__ grad_weights MSDA_LEVELS_ARGUMENT) {
    MSDA_LEVELS_VALUE
    __shared__ Staged staged[kGroups * kSlots];
    __shared__ StagedGradient gradients[kGroups * kSlots];
    const int first = blockIdx.x * kGroups;
    stage(locations, weights, first, groups, levels, staged,
          [&](int slot, const Sample<Acc> &sample, Acc weight) {
              gradients[slot] = {sample.fx, sample.fy, weight};
          });
    __syncthreads();

    // No early return: every thread of the warp takes part in the sums over lanes.
    const int local = threadIdx.x / kLanes, channel = threadIdx.x % kLanes * kLaneChannels;
    const int group = first + local;
    const bool active = group < groups && channel < kChannels;
    const Index offset = active ? group / kHeads / queries * tokens_of(levels) * kStride +
                                      group % kHeads * kChannels + channel
                                : 0;
    const Lane gradient =
        active ? Lane::load(grad_out + Index(group) * kChannels + channel) : Lane::zero();
    for (int i = local * kSlots; i < local * kSlots + kSamples; ++i) {
        SampleGradient<Acc> sum{0, 0, 0};
        if (active) {
            const Staged sample = staged[i];
            const StagedGradient share = gradients[i];
            const Index at = offset + sample.token * kStride;
            const Corners<Acc> dots =
                corner_dots(gradient, value + at, kStride, sample.down(), sample.mask());
            // The gradients are linear in the scalar products: each lane has its channels' part.
            // The level's size comes in as they are written out.
            sum = sample_gradient(dots, share.x, share.y, share.weight, 1, 1);
            scatter(gradient, grad_value + at, kStride, sample.down(), sample.mask(), sample.share);
        }
#pragma unroll
        for (int other = kLanes / 2; other > 0; other /= 2) {
            sum.weight += __shfl_xor_sync(0xffffffffu, sum.weight, other);
            sum.x += __shfl_xor_sync(0xffffffffu, sum.x, other);
            sum.y += __shfl_xor_sync(0xffffffffu, sum.y, other);
        }
        __syncwarp();  // all lanes have read gradients[i], also where kLanes is 1
        if (active && channel == 0) gradients[i] = {sum.x, sum.y, sum.weight};
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kGroups * kSamples; i += kThreads) {
        const Index at = Index(first) * kSamples + i;
        if (at >= Index(groups) * kSamples) break;
        const Level size = level_at(levels, level_of(i % kSamples));
        const StagedGradient gradient = gradients[slot_of(i)];
        reinterpret_cast<Point *>(grad_locations)[at] = {
            gradient.x * static_cast<Acc>(size.width), gradient.y * static_cast<Acc>(size.height)};
        grad_weights[at] = gradient.weight;
    }
}
#endif

}  // namespace MSDA_TARGET
}  // namespace detr_msda
