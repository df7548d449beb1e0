// The Python module `detr.winograd._native`; `detr.winograd` says what it is for. This file only
// guarantees that the kernel never reads or writes outside its arrays.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <vector>

#include "../../msda/cpu/pool.hpp"
#include "kernel.hpp"

namespace nb = nanobind;
using namespace detr_winograd;

namespace {

using Array = nb::ndarray<float, nb::device::cpu, nb::c_contig>;
using ConstArray = nb::ndarray<const float, nb::ro, nb::device::cpu, nb::c_contig>;

// Tiles in a block: few, so that they stay in the second cache; more where the kernels, which each
// block reads, are larger than the tiles.
constexpr long long kFewest = 24, kMost = 192, kWeightsPerTile = 1024;

bool supported() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

void expect(bool right, const char *what) {
    if (!right) throw std::invalid_argument(what);
}

void pack_weights(const ConstArray &weights, const Array &packed) {
    expect(supported(), "this machine has no AVX2");
    expect(weights.ndim() == 4 && weights.shape(2) == 3 && weights.shape(3) == 3,
           "weights must be [outputs, inputs, 3, 3]");
    const long long outputs = weights.shape(0), inputs = weights.shape(1);
    expect(outputs % kPanel == 0 && inputs % kVector == 0,
           "outputs come in sixteens, inputs in eights");
    expect((long long)packed.size() == kPlaces * outputs * inputs, "packed has the wrong size");
    pack(weights.data(), outputs, inputs, packed.data());
}

struct Call {
    Problem problem;
    long long tiles, blocks;
};

void work(void *context, long long index, int) {
    const Call &call = *static_cast<const Call *>(context);
    const Problem &p = call.problem;
    // Kept from call to call: fresh memory costs a page fault for each 4 KiB of it.
    thread_local std::vector<float> scratch;
    const size_t size = kPlaces * p.block * (p.inputs + p.outputs);
    if (scratch.size() < size) scratch.resize(size);
    const long long first = index % call.blocks * p.block;
    convolve(p, index / call.blocks, first, std::min(p.block, call.tiles - first), scratch.data());
}

void forward(const ConstArray &map, const ConstArray &kernels, const ConstArray &bias,
             const Array &out, int threads, std::optional<ConstArray> added, int activation) {
    expect(supported(), "this machine has no AVX2");
    expect(map.ndim() == 4 && out.ndim() == 4, "maps must be [images, height, width, channels]");
    expect(threads > 0, "threads must be positive");
    Problem p{};
    p.images = map.shape(0), p.height = map.shape(1), p.width = map.shape(2);
    p.inputs = map.shape(3), p.outputs = out.shape(3);
    expect(p.outputs % kPanel == 0 && p.inputs % kVector == 0,
           "outputs come in sixteens, inputs in eights");
    for (int i = 0; i < 3; ++i) expect(map.shape(i) == out.shape(i), "out has the wrong shape");
    expect((long long)kernels.size() == kPlaces * p.inputs * p.outputs,
           "kernels have the wrong size");
    expect((long long)bias.size() == p.outputs, "bias has the wrong size");
    if (added) {
        expect(added->ndim() == 4, "added must be a map");
        for (int i = 0; i < 4; ++i) {
            expect(added->shape(i) == out.shape(i), "added has the wrong shape");
        }
        p.added = added->data();
    }
    expect(activation >= 0 && activation <= 2, "no such activation");
    p.activation = static_cast<Activation>(activation);
    if (map.size() == 0 || out.size() == 0) return;
    const std::vector<float> zeros(p.inputs);
    p.map = map.data(), p.kernels = kernels.data(), p.bias = bias.data(), p.zeros = zeros.data();
    p.out = out.data();
    Call call{p, tiles_of(p), 0};
    const long long fair = (p.images * call.tiles + threads - 1) / threads;
    const long long block =
        std::clamp(p.inputs * p.outputs / kWeightsPerTile, kFewest, kMost);
    call.problem.block = std::max(1LL, std::min({block, fair, call.tiles}));
    call.blocks = (call.tiles + call.problem.block - 1) / call.problem.block;
    nb::gil_scoped_release unlocked;
    detr_msda::parallel(p.images * call.blocks, threads, work, &call);
}

}  // namespace

NB_MODULE(_native, module) {
    module.def("supported", supported);
    module.def("pack", pack_weights, nb::arg("weights"), nb::arg("packed"));
    module.def("forward", forward, nb::arg("map"), nb::arg("kernels"), nb::arg("bias"),
               nb::arg("out"), nb::arg("threads"), nb::arg("added").none(), nb::arg("activation"));
}
