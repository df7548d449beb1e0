// Compiled by test_msda_cuda.py behind the macros of one attention; runs msda.cu's kernels as they
// are.
#include "cuda_on_cpu.hpp"

#include MSDA_KERNELS

using namespace detr_msda::generic;

extern "C" void run_forward(const void *value, const void *locations, const void *weights,
                            int queries, int groups, void *out, int blocks) {
    fibers::run(blocks, kThreads, [=] {
        msda_forward(static_cast<const Value *>(value), static_cast<const Acc *>(locations),
                     static_cast<const Acc *>(weights), queries, groups, static_cast<Value *>(out));
    });
}

extern "C" void run_backward(const void *grad_out, const void *value, const void *locations,
                             const void *weights, int queries, int groups, void *grad_value,
                             void *grad_locations, void *grad_weights, int blocks) {
    fibers::run(blocks, kThreads, [=] {
        msda_backward(static_cast<const Value *>(grad_out), static_cast<const Value *>(value),
                      static_cast<const Acc *>(locations), static_cast<const Acc *>(weights),
                      queries, groups, static_cast<Acc *>(grad_value),
                      static_cast<Acc *>(grad_locations), static_cast<Acc *>(grad_weights));
    });
}
