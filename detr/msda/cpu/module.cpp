// The Python module `detr.msda._native`. Arrays come in over DLPack or the buffer protocol, dense
// and on the CPU; `detr.msda` checks the rest with friendlier messages, this file only guarantees
// that no kernel ever reads or writes outside its arrays.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "kernels.hpp"
#include "pool.hpp"

namespace nb = nanobind;
using namespace detr_msda;

namespace {

// Values of a packed head: the kernels count its bytes in 32 bits, and a value has 8 at most.
constexpr long long kMostPacked = 1LL << 29;

using Array = nb::ndarray<nb::device::cpu, nb::c_contig>;
using ConstArray = nb::ndarray<nb::ro, nb::device::cpu, nb::c_contig>;
using Sizes = std::vector<long long>;

std::vector<const Kernels *> available() {
    std::vector<const Kernels *> found{&kernels_baseline()};
#if defined(MSDA_X86)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        found.push_back(&kernels_avx2());
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
            found.push_back(&kernels_avx512());
        }
    }
#endif
    return found;
}

const Kernels &kernels_of(const std::string &name) {
    static const std::vector<const Kernels *> found = available();
    if (name.empty()) return *found.back();
    for (const Kernels *kernels : found) {
        if (name == kernels->name) return *kernels;
    }
    throw std::invalid_argument("this machine has no '" + name + "' kernels");
}

// numpy has no bfloat16: such arrays are handed over as uint16.
ValueType value_type(nb::dlpack::dtype type) {
    if (type == nb::dtype<float>()) return ValueType::float32;
    if (type == nb::dtype<double>()) return ValueType::float64;
    if (type.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Float) && type.bits == 16) {
        return ValueType::float16;
    }
    if (type.bits == 16) return ValueType::bfloat16;
    throw std::invalid_argument("values must be float16, bfloat16, float32 or float64");
}

template <class A>
void expect(const char *name, const A &array, const Sizes &sizes) {
    bool same = array.ndim() == sizes.size();
    for (size_t i = 0; same && i < sizes.size(); ++i) same = (long long)array.shape(i) == sizes[i];
    if (!same) throw std::invalid_argument(std::string(name) + " has the wrong shape");
}

struct Call {
    Problem problem;
    ValueType type;
    std::vector<int> heights, widths;
    std::vector<long long> starts, points, firsts;
    long long cells = 0;  // of a packed head
    Sizes value_sizes, location_sizes, weight_sizes, out_sizes;

    Call(const ConstArray &value, const std::vector<std::pair<int, int>> &shapes,
         const ConstArray &locations, const ConstArray &weights, const Sizes &level_points)
        : type(value_type(value.dtype())), points(level_points) {
        long long tokens = 0;
        for (const auto &[height, width] : shapes) {
            if (height < 1 || width < 1)
                throw std::invalid_argument("level sizes must be positive");
            if (height > kMostCells || width > kMostCells)
                throw std::invalid_argument("a level is too large");
            heights.push_back(height);
            widths.push_back(width);
            starts.push_back(tokens);
            tokens += (long long)height * width;
            cells += packed_cells(height, width);
            if (tokens > kMostTokens) throw std::invalid_argument("the levels are too large");
        }
        const bool unequal = !points.empty();
        if (value.ndim() != 4 || locations.ndim() != (unequal ? 5 : 6)) {
            throw std::invalid_argument("value needs 4 dimensions, locations 6, or 5 with points");
        }
        const long long batch = value.shape(0), heads = value.shape(2), channels = value.shape(3);
        const long long queries = locations.shape(1), levels = (long long)shapes.size();
        if (!unequal) points.assign(levels, locations.shape(4));
        if ((long long)points.size() != levels)
            throw std::invalid_argument("points must be one number per level");
        long long samples = 0;
        for (const long long count : points) {
            if (count < 0 || count > kMostSamples)
                throw std::invalid_argument("a level has 0 to 512 points");
            firsts.push_back(samples);
            samples += count;
        }
        if (samples > kMostSamples)
            throw std::invalid_argument("a query has at most 512 samples in a head");
        value_sizes = {batch, tokens, heads, channels};
        weight_sizes = {batch, queries, heads};
        if (unequal) {
            weight_sizes.push_back(samples);
        } else {
            weight_sizes.insert(weight_sizes.end(), {levels, (long long)locations.shape(4)});
        }
        location_sizes = weight_sizes;
        location_sizes.push_back(2);
        out_sizes = {batch, queries, heads * channels};
        expect("value", value, value_sizes);
        expect("locations", locations, location_sizes);
        expect("weights", weights, weight_sizes);
        expect_coordinates("locations", locations.dtype());
        expect_coordinates("weights", weights.dtype());
        problem = {batch,          tokens,        heads,         channels,      queries,      levels,
                   samples,        heights.data(), widths.data(), starts.data(), points.data(),
                   firsts.data()};
    }
    void expect_coordinates(const char *name, nb::dlpack::dtype actual) const {
        const auto wanted = type == ValueType::float64 ? nb::dtype<double>() : nb::dtype<float>();
        if (!(actual == wanted))
            throw std::invalid_argument(std::string(name) + " has the wrong dtype");
    }
    void expect_values(const char *name, nb::dlpack::dtype actual) const {
        if (value_type(actual) != type) {
            throw std::invalid_argument(std::string(name) + " must have the dtype of value");
        }
    }
};

// Scratch memory of all threads, each part starting on its own cache line.
class Scratch {
 public:
    Scratch(long long bytes, int threads)
        : step_((bytes + 63) / 64 * 64), memory_(new char[step_ * threads + 64]) {}
    void *of(int worker) {
        const auto address = reinterpret_cast<uintptr_t>(memory_.get());
        return reinterpret_cast<char *>((address + 63) / 64 * 64) + worker * step_;
    }

 private:
    long long step_;
    std::unique_ptr<char[]> memory_;
};

template <class Body>
void parallel_for(long long count, int threads, Body body) {
    parallel(
        count, threads,
        [](void *context, long long index, int worker) {
            (*static_cast<Body *>(context))(index, worker);
        },
        &body);
}

void forward(const ConstArray &value, const std::vector<std::pair<int, int>> &shapes,
             const ConstArray &locations, const ConstArray &weights, const Array &out, int threads,
             const std::string &target, const Sizes &points) {
    const Call call(value, shapes, locations, weights, points);
    expect("out", out, call.out_sizes);
    call.expect_values("out", out.dtype());
    const Kernels &kernels = kernels_of(target);
    const ForwardArrays arrays{value.data(), locations.data(), weights.data(), out.data()};
    threads = std::max(threads, 1);
    const Problem &problem = call.problem;
    const long long queries = std::max(problem.queries, 1LL), heads = std::max(problem.heads, 1LL);
    const long long groups = std::max(problem.batch * heads, 1LL);
    // Packing a head costs one pass over its cells and pays where each is then read several times.
    long long parts = (threads * 2 + groups - 1) / groups;
    const bool packed = queries / parts * problem.samples >= 4 * call.cells &&
                        call.cells * problem.channels < kMostPacked;
    // Otherwise pieces small enough to share out evenly, yet too large for that to cost anything.
    if (!packed) parts = std::max(threads * 8 / std::max(problem.batch, 1LL), (queries + 63) / 64);
    const long long step = (queries + parts - 1) / parts, pieces = (queries + step - 1) / step;
    const long long units = packed ? problem.heads : 1, heads_of_unit = packed ? 1 : problem.heads;
    const long long tasks = problem.batch * units * pieces;
    threads = (int)std::clamp(tasks, 1LL, (long long)threads);
    nb::gil_scoped_release release;
    Scratch scratch(kernels.forward_scratch(problem, call.type, packed), threads);
    parallel_for(tasks, threads, [&](long long index, int worker) {
        const long long first_query = index % pieces * step, rest = index / pieces;
        const long long first_head = rest % units;
        kernels.forward(problem, call.type, arrays, scratch.of(worker),
                        {rest / units, first_head, first_head + heads_of_unit, first_query,
                         std::min(problem.queries, first_query + step), packed});
    });
}

void backward(const ConstArray &grad_out, const ConstArray &value,
              const std::vector<std::pair<int, int>> &shapes, const ConstArray &locations,
              const ConstArray &weights, const Array &grad_value, const Array &grad_locations,
              const Array &grad_weights, int threads, const std::string &target,
              const Sizes &points) {
    const Call call(value, shapes, locations, weights, points);
    expect("grad_out", grad_out, call.out_sizes);
    expect("grad_value", grad_value, call.value_sizes);
    expect("grad_locations", grad_locations, call.location_sizes);
    expect("grad_weights", grad_weights, call.weight_sizes);
    call.expect_values("grad_out", grad_out.dtype());
    call.expect_values("grad_value", grad_value.dtype());
    call.expect_coordinates("grad_locations", grad_locations.dtype());
    call.expect_coordinates("grad_weights", grad_weights.dtype());
    const Kernels &kernels = kernels_of(target);
    const BackwardArrays arrays{grad_out.data(),    value.data(),      locations.data(),
                                weights.data(),     grad_value.data(), grad_locations.data(),
                                grad_weights.data()};
    threads = std::max(threads, 1);
    const Problem &problem = call.problem;
    // Few heads to a unit share the work out better, many read memory in longer runs.
    const long long units = std::max(problem.batch * problem.levels, 1LL);
    const long long wanted =
        std::clamp((threads * 4 + units - 1) / units, 1LL, std::max(problem.heads, 1LL));
    long long most = 1;
    for (const long long points_of_level : call.points) most = std::max(most, points_of_level);
    const long long fitting = kMostSamples / most;
    const long long heads = std::min((problem.heads + wanted - 1) / wanted, fitting);
    const long long parts = (problem.heads + heads - 1) / std::max(heads, 1LL);
    const long long tasks = problem.batch * problem.levels * parts;  // none of no images
    threads = (int)std::clamp(tasks, 1LL, (long long)threads);
    nb::gil_scoped_release release;
    Scratch scratch(kernels.backward_scratch(problem, call.type, heads), threads);
    parallel_for(tasks, threads, [&](long long index, int worker) {
        const long long first = index % parts * heads, image = index / parts % problem.batch;
        kernels.backward(problem, call.type, arrays, scratch.of(worker),
                         {image, index / parts / problem.batch, std::min(first, problem.heads),
                          std::min(first + heads, problem.heads)});
    });
}

std::vector<std::string> targets() {
    std::vector<std::string> names;
    for (const Kernels *kernels : available()) names.push_back(kernels->name);
    return names;
}

}  // namespace

NB_MODULE(_native, module) {
    module.doc() = "Multi-scale deformable attention on the CPU.";
    module.def("forward", &forward, nb::arg("value").noconvert(), nb::arg("shapes"),
               nb::arg("locations").noconvert(), nb::arg("weights").noconvert(),
               nb::arg("out").noconvert(), nb::arg("threads"), nb::arg("target") = "",
               nb::arg("points") = Sizes{});
    module.def("backward", &backward, nb::arg("grad_out").noconvert(), nb::arg("value").noconvert(),
               nb::arg("shapes"), nb::arg("locations").noconvert(), nb::arg("weights").noconvert(),
               nb::arg("grad_value").noconvert(), nb::arg("grad_locations").noconvert(),
               nb::arg("grad_weights").noconvert(), nb::arg("threads"), nb::arg("target") = "",
               nb::arg("points") = Sizes{});
    module.def("targets", &targets,
               "Instruction sets this machine can run, slowest first; the last is the default.");
}
