// Just enough of CUDA to run msda.cu's kernels on the CPU: each thread of a block is a fiber, and
// __syncthreads and __shfl_xor_sync hand over to the next one until all have arrived. In which order
// they take turns is not CUDA's to promise, so it can be chosen: what depends on it is a race.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

// The header then takes the ways it takes on a GPU.
#define __CUDACC__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(threads)

struct Dim {
    int x;
};
static Dim threadIdx, blockIdx;

namespace fibers {

struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(128 * 1024);
    bool finished = false;
    double slot = 0;
};
static std::vector<Fiber> all;
static ucontext_t scheduler;
static std::function<void()> body;
enum class Order { ascending, descending, shuffled };
static Order order = Order::ascending;
static std::mt19937 generator(7);

// The threads of a block in the order in which they take their next turn.
static std::vector<int> turns(int threads) {
    std::vector<int> result(threads);
    std::iota(result.begin(), result.end(), 0);
    if (order == Order::descending) std::reverse(result.begin(), result.end());
    if (order == Order::shuffled) std::shuffle(result.begin(), result.end(), generator);
    return result;
}

static void entry() {
    body();
    all[threadIdx.x].finished = true;
    swapcontext(&all[threadIdx.x].context, &scheduler);
}

// Lets every other fiber run up to its next meeting point.
static void meet() {
    const int me = threadIdx.x;
    swapcontext(&all[me].context, &scheduler);
}

static void run(int blocks, int threads, std::function<void()> kernel) {
    body = kernel;
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
        all = std::vector<Fiber>(threads);
        for (Fiber &fiber : all) {
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.data();
            fiber.context.uc_stack.ss_size = fiber.stack.size();
            makecontext(&fiber.context, entry, 0);
        }
        for (bool any = true; any;) {
            any = false;
            for (int i : turns(threads)) {
                if (all[i].finished) continue;
                any = true;
                threadIdx.x = i;
                swapcontext(&scheduler, &all[i].context);
            }
        }
    }
}

}  // namespace fibers

static void __syncthreads() { fibers::meet(); }
static void __syncwarp() { fibers::meet(); }
template <class T>
static T __shfl_xor_sync(unsigned, T value, int other) {
    const int me = threadIdx.x;
    fibers::all[me].slot = value;
    fibers::meet();
    const T received = static_cast<T>(fibers::all[me ^ other].slot);
    fibers::meet();
    return received;
}
template <class T>
static void atomicAdd(T *to, T value) {
    *to += value;
}
