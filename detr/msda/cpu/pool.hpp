// Worker threads for the kernels.
//
// Not OpenMP, whose idle threads keep their cores busy for a while after each call and slow
// whatever runs next: a kernel call followed by ONNX Runtime's matrix products took a sixth longer
// with it (docs/performance.md). These sleep, and the module needs no OpenMP library beside torch's
// own.
#pragma once

namespace detr_msda {

// Calls task(context, index, worker) for each index in [0, count), on up to `threads` threads of
// which the caller is number 0; returns when all are done. Indices are handed out in order, so
// neighbors run at about the same time. A call made while another runs works on its own thread.
void parallel(long long count, int threads,
              void (*task)(void *context, long long index, int worker), void *context);

}  // namespace detr_msda
