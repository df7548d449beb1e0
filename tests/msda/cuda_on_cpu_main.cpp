// Runs msda.cu's kernels on a problem from a file, every array in a heap block of exactly its size,
// so that AddressSanitizer sees each access beside it. Compiled by test_msda_cuda_memory.py behind
// the macros of one attention.
//
//   PROGRAM INPUT OUTPUT ORDER     ORDER: 0 ascending, 1 descending, 2 shuffled
#include "cuda_on_cpu.hpp"

#include MSDA_KERNELS

#include <cstdio>
#include <cstring>

using namespace detr_msda::generic;

// On 16 bytes, as torch's and TensorRT's arrays are.
template <class T>
static T *block(size_t count) {
    void *memory = nullptr;
    if (count == 0 || posix_memalign(&memory, 16, count * sizeof(T)) != 0) std::abort();
    return static_cast<T *>(memory);
}

template <class T>
static T *read(std::FILE *from, size_t count) {
    T *array = block<T>(count);
    if (std::fread(array, sizeof(T), count, from) != count) std::abort();
    return array;
}

// What the kernel is to write is anything but zero before.
template <class T>
static T *output(size_t count, int fill) {
    T *array = block<T>(count);
    std::memset(static_cast<void *>(array), fill, count * sizeof(T));
    return array;
}

template <class T>
static void write(std::FILE *to, T *array, size_t count) {
    if (std::fwrite(array, sizeof(T), count, to) != count) std::abort();
    std::free(array);
}

int main(int, char **arguments) {
    std::FILE *from = std::fopen(arguments[1], "rb"), *to = std::fopen(arguments[2], "wb");
    fibers::order = static_cast<fibers::Order>(std::atoi(arguments[3]));
    int *const sizes = read<int>(from, 3);
    const int batch = sizes[0], queries = sizes[1], tokens = sizes[2];
    Levels *const at = read<Levels>(from, 1);
    const int groups = batch * queries * kHeads, blocks = (groups + kGroups - 1) / kGroups;
    const size_t values = size_t(batch) * tokens * kStride, samples = size_t(groups) * kSamples,
                 outs = size_t(groups) * kChannels;
    Value *value = read<Value>(from, values);
    Acc *locations = read<Acc>(from, 2 * samples), *weights = read<Acc>(from, samples);
    Value *grad_out = read<Value>(from, outs), *out = output<Value>(outs, 0xff);
    Acc *grad_value = output<Acc>(values, 0), *grad_locations = output<Acc>(2 * samples, 0xff),
        *grad_weights = output<Acc>(samples, 0xff);
#if defined(MSDA_SIZES)
#define LEVELS
#else
#define LEVELS , *at
#endif
    fibers::run(blocks, kThreads,
                [=] { msda_forward(value, locations, weights, queries, groups, out LEVELS); });
    fibers::run(blocks, kThreads, [=] {
        msda_backward(grad_out, value, locations, weights, queries, groups, grad_value,
                      grad_locations, grad_weights LEVELS);
    });
    write(to, out, outs);
    write(to, grad_value, values);
    write(to, grad_locations, 2 * samples);
    write(to, grad_weights, samples);
    for (void *array : {static_cast<void *>(value), static_cast<void *>(locations),
                        static_cast<void *>(weights), static_cast<void *>(grad_out),
                        static_cast<void *>(sizes), static_cast<void *>(at)}) {
        std::free(array);
    }
    return std::fclose(to) + std::fclose(from);
}
