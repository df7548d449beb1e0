// Runs the CPU kernels on a problem from a file: the build with the processor's vectors and a scalar
// one. Compiled for Arm and run under emulation by test_msda_arm.py.
//
//   PROGRAM INPUT OUTPUT
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernels.hpp"
#include "pool.hpp"

namespace detr_msda {
const Kernels &kernels_scalar();
}
using namespace detr_msda;

using Bytes = std::vector<char>;

static Bytes read(std::FILE *from, size_t size) {
    Bytes bytes(size);
    if (std::fread(bytes.data(), 1, size, from) != size) std::abort();
    return bytes;
}

struct Sizes {
    int type, batch, tokens, heads, channels, queries, levels, points;
};

struct Work {
    const Kernels &kernels;
    const Problem &problem;
    ValueType type;
    bool packed;
    ForwardArrays forward;
    BackwardArrays backward;
    std::vector<Bytes> scratch;  // of each worker
};

// One head of one image, as the module shares the work out.
static void forward_unit(void *context, long long index, int worker) {
    Work &work = *static_cast<Work *>(context);
    const Problem &p = work.problem;
    const ForwardUnit unit{index / p.heads, index % p.heads, index % p.heads + 1, 0, p.queries,
                           work.packed};
    work.kernels.forward(p, work.type, work.forward, work.scratch[worker].data(), unit);
}
static void backward_unit(void *context, long long index, int worker) {
    Work &work = *static_cast<Work *>(context);
    const Problem &p = work.problem;
    const BackwardUnit unit{index / p.levels, index % p.levels, 0, p.heads};
    work.kernels.backward(p, work.type, work.backward, work.scratch[worker].data(), unit);
}

int main(int, char **arguments) {
    std::FILE *from = std::fopen(arguments[1], "rb"), *to = std::fopen(arguments[2], "wb");
    Sizes s;
    if (std::fread(&s, sizeof s, 1, from) != 1) std::abort();
    std::vector<int> heights(s.levels), widths(s.levels);
    std::vector<long long> starts(s.levels), points(s.levels, s.points), firsts(s.levels);
    long long start = 0;
    for (int i = 0; i < s.levels; ++i) {
        if (std::fread(&heights[i], 4, 1, from) + std::fread(&widths[i], 4, 1, from) != 2) return 1;
        starts[i] = start;
        firsts[i] = static_cast<long long>(i) * s.points;
        start += heights[i] * static_cast<long long>(widths[i]);
    }
    const Problem problem{s.batch,         s.tokens,       s.heads,       s.channels,
                          s.queries,       s.levels,       static_cast<long long>(s.levels) * s.points,
                          heights.data(),  widths.data(),  starts.data(), points.data(),
                          firsts.data()};
    const auto type = static_cast<ValueType>(s.type);
    const size_t value_size = type == ValueType::float32 ? 4 : type == ValueType::float64 ? 8 : 2;
    const size_t acc_size = type == ValueType::float64 ? 8 : 4;
    const size_t values = size_t(s.batch) * s.tokens * s.heads * s.channels * value_size,
                 outs = size_t(s.batch) * s.queries * s.heads * s.channels * value_size,
                 samples = size_t(s.batch) * s.queries * s.heads * problem.samples * acc_size;
    const Bytes value = read(from, values), locations = read(from, 2 * samples),
                weights = read(from, samples), grad_out = read(from, outs);
    for (const Kernels *kernels : {&kernels_baseline(), &kernels_scalar()}) {
        for (const bool packed : {false, true}) {
            Bytes out(outs, 99), grad_value(values, 99), grad_locations(2 * samples, 99),
                grad_weights(samples, 99);
            long long bytes = kernels->forward_scratch(problem, type, packed);
            const long long other = kernels->backward_scratch(problem, type, s.heads);
            if (other > bytes) bytes = other;
            Work work{*kernels,
                      problem,
                      type,
                      packed,
                      {value.data(), locations.data(), weights.data(), out.data()},
                      {grad_out.data(), value.data(), locations.data(), weights.data(),
                       grad_value.data(), grad_locations.data(), grad_weights.data()},
                      std::vector<Bytes>(2, Bytes(bytes + 64))};
            parallel(static_cast<long long>(s.batch) * s.heads, 2, forward_unit, &work);
            parallel(static_cast<long long>(s.batch) * s.levels, 2, backward_unit, &work);
            for (const Bytes *result : {&out, &grad_value, &grad_locations, &grad_weights}) {
                if (std::fwrite(result->data(), 1, result->size(), to) != result->size()) return 1;
            }
        }
    }
    return std::fclose(to) + std::fclose(from);
}
