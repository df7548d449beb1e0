// The kernels of one attention behind the stand-in for the driver: reads a launch's arguments from
// their addresses, as the driver does, and runs msda.cu as it is. Compiled by fake_driver.py behind
// the macros of one attention.
#include "cuda_on_cpu.hpp"

#include MSDA_KERNELS

using namespace detr_msda::generic;

template <class T>
static T argument(void **parameters, int at) {
    return *static_cast<T *>(parameters[at]);
}

#if defined(MSDA_SIZES)
#define LEVELS(at)
#else
#define LEVELS(at) , argument<Levels>(p, at)
#endif

extern "C" void run(int backward, void **parameters, int blocks, int threads) {
    if (threads != kThreads) std::abort();
    void **const p = parameters;
    if (!backward) {
        fibers::run(blocks, kThreads, [=] {
            msda_forward(argument<const Value *>(p, 0), argument<const Acc *>(p, 1),
                         argument<const Acc *>(p, 2), argument<int>(p, 3), argument<int>(p, 4),
                         argument<Value *>(p, 5) LEVELS(6));
        });
        return;
    }
#if !defined(MSDA_FORWARD_ONLY)
    fibers::run(blocks, kThreads, [=] {
        msda_backward(argument<const Value *>(p, 0), argument<const Value *>(p, 1),
                      argument<const Acc *>(p, 2), argument<const Acc *>(p, 3),
                      argument<int>(p, 4), argument<int>(p, 5), argument<Acc *>(p, 6),
                      argument<Acc *>(p, 7), argument<Acc *>(p, 8) LEVELS(9));
    });
#endif
}
