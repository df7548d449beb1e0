// A stand-in for the driver, libcuda.so.1: every call that matters is written to the file
// FAKE_CUDA_LOG, one a line, with the arguments as the driver would read them. Nothing runs, unless
// FAKE_CUDA_KERNELS is a library of fake_kernels.cpp: its kernels then run on the host, whose memory
// is the device's. Kernels whose levels are fixed have one argument less; "none" says so. FAKE_CUDA_FAIL is "FUNCTION=CODE": that function then fails so. Compiled by
// fake_driver.py.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int Result;

// The context of device n is n + 1; each thread has its own stack of them.
static __thread void *current[8];
static __thread int depth = 0;

static void note(const char *format, ...) {
    FILE *log = fopen(getenv("FAKE_CUDA_LOG"), "a");
    va_list arguments;
    va_start(arguments, format);
    vfprintf(log, format, arguments);
    va_end(arguments);
    fclose(log);
}

// A stream that is being recorded takes launches; anything that would allocate, wait or load code is
// refused and voids the recording, as a GPU's driver does.
static enum { idle, recording, void_ } capture = idle;

static Result answer(const char *name) {
    if (capture != idle && strcmp(name, "cuLaunchKernel")) return capture = void_, 900;
    const char *fail = getenv("FAKE_CUDA_FAIL");
    const size_t length = strlen(name);
    return fail && !strncmp(fail, name, length) && fail[length] == '=' ? atoi(fail + length + 1) : 0;
}

static const char *errors[1000];
static void name_errors(void) {
    errors[1] = "CUDA_ERROR_INVALID_VALUE";
    errors[2] = "CUDA_ERROR_OUT_OF_MEMORY";
    errors[100] = "CUDA_ERROR_NO_DEVICE";
    errors[719] = "CUDA_ERROR_LAUNCH_FAILED";
    errors[209] = "CUDA_ERROR_NO_BINARY_FOR_GPU";
    errors[222] = "CUDA_ERROR_UNSUPPORTED_PTX_VERSION";
    errors[700] = "CUDA_ERROR_ILLEGAL_ADDRESS";
    errors[901] = "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED";
    errors[900] = "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED";
}

Result fake_cuInit(unsigned flags) { return answer("cuInit"); }
Result fake_cuDriverGetVersion(int *version) { return *version = 13000, 0; }
Result fake_cuDeviceGetCount(int *count) { return *count = 2, 0; }
Result fake_cuDeviceGet(int *device, int number) { return *device = number, answer("cuDeviceGet"); }
Result fake_cuDeviceGetAttribute(int *value, int attribute, int device) {
    const char *capability = getenv("FAKE_CUDA_CAPABILITY");
    const int number = capability ? atoi(capability) : 90;
    *value = attribute == 75 ? number / 10 : attribute == 76 ? number % 10 : 0;
    return 0;
}
Result fake_cuDevicePrimaryCtxRetain(void **context, int device) {
    note("retain %d\n", device);
    *context = (void *)(long)(device + 1);
    return answer("cuDevicePrimaryCtxRetain");
}
Result fake_cuCtxGetCurrent(void **context) {
    *context = depth ? current[depth - 1] : NULL;
    return 0;
}
Result fake_cuCtxPushCurrent(void *context) {
    note("push %ld\n", (long)context);
    current[depth++] = context;
    return 0;
}
Result fake_cuCtxPopCurrent(void **context) {
    *context = current[--depth];
    note("pop %ld\n", (long)*context);
    return 0;
}
Result fake_cuLibraryLoadData(void **library, const void *code, void *jit, void **jit_values,
                              unsigned jit_count, void *options, void **values, unsigned count) {
    note("load %.4s jit %u options %u\n", (const char *)code, jit_count, count);
    *library = (void *)0x2000;
    return answer("cuLibraryLoadData");
}
Result fake_cuLibraryGetKernel(void **kernel, void *library, const char *name) {
    note("kernel %s\n", name);
    *kernel = (void *)(strstr(name, "backward") ? 0x3001L : 0x3000L);
    return answer("cuLibraryGetKernel");
}
Result fake_cuMemAlloc(void **pointer, size_t size) {
    *pointer = malloc(size ? size : 1);
    return answer("cuMemAlloc");
}
Result fake_cuMemFree(void *pointer) { return free(pointer), 0; }
Result fake_cuMemsetD8(void *pointer, unsigned char value, size_t size) {
    return memset(pointer, value, size), 0;
}
Result fake_cuMemcpyHtoD(void *to, const void *from, size_t size) {
    return memcpy(to, from, size), answer("cuMemcpyHtoD");
}
Result fake_cuMemcpyDtoH(void *to, const void *from, size_t size) {
    return memcpy(to, from, size), answer("cuMemcpyDtoH");
}
Result fake_cuStreamCreate(void **stream, unsigned flags) {
    note("stream %u\n", flags);
    return *stream = (void *)79L, 0;
}
Result fake_cuStreamBeginCapture(void *stream, int mode) {
    note("record %ld mode %d\n", (long)stream, mode);
    return capture = recording, 0;
}
Result fake_cuStreamEndCapture(void *stream, void **graph) {
    const Result result = capture == recording ? 0 : 901;
    *graph = result ? NULL : (void *)0x4000L;
    return capture = idle, result;
}
// An error in what was queued shows where it is waited for.
Result fake_cuStreamSynchronize(void *stream) { return answer("cuStreamSynchronize"); }
Result fake_cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                           unsigned by, unsigned bz, unsigned shared, void *stream,
                           void **parameters, void **extra) {
    // Forward: value, locations, weights, queries, groups, out, levels; backward has one more
    // input and two more outputs.
    const int backward = function == (void *)0x3001L, inputs = backward ? 4 : 3;
    note("launch %s grid %u %u %u block %u %u %u shared %u stream %ld context %ld extra %p values",
         backward ? "backward" : "forward", gx, gy, gz, bx, by, bz, shared, (long)stream,
         depth ? (long)current[depth - 1] : 0L, (void *)extra);
    int at = 0;
    for (; at < inputs; ++at) note(" %ld", *(long *)parameters[at]);
    for (int i = 0; i < 2; ++i, ++at) note(" %d", *(int *)parameters[at]);
    for (int i = 0; i < (backward ? 3 : 1); ++i, ++at) note(" %ld", *(long *)parameters[at]);
    const char *kernels = getenv("FAKE_CUDA_KERNELS");
    for (int i = 0; i < 4 && !kernels; ++i) note(" %d", ((int *)parameters[at])[i]);
    note("\n");
    if (kernels && strcmp(kernels, "none")) {
        void *library = dlopen(kernels, RTLD_NOW);
        void (*run)(int, void **, int, int) =
            library ? (void (*)(int, void **, int, int))dlsym(library, "run") : NULL;
        if (!run) return 1;
        run(backward, parameters, gx, bx);
    }
    return answer("cuLaunchKernel");
}
Result fake_cuGetErrorName(int error, const char **name) {
    name_errors();
    return *name = errors[error] ? errors[error] : "CUDA_ERROR_UNKNOWN", 0;
}
Result fake_cuGetErrorString(int error, const char **text) { return *text = "an error", 0; }

static Result missing(void) { return 801; }

// How the bindings find everything else.
Result cuGetProcAddress_v2(const char *name, void **function, int version, unsigned long long flags,
                           int *status) {
    char own[256];
    Dl_info here;
    snprintf(own, sizeof own, "fake_%s", name);
    dladdr((void *)cuGetProcAddress_v2, &here);
    void *found = dlsym(dlopen(here.dli_fname, RTLD_NOW | RTLD_NOLOAD), own);
    if (!strcmp(name, "cuGetProcAddress")) found = (void *)cuGetProcAddress_v2;
    *function = found ? found : (void *)missing;
    if (status) *status = 0;
    return 0;
}
Result cuGetProcAddress(const char *name, void **function, int version, unsigned long long flags) {
    return cuGetProcAddress_v2(name, function, version, flags, NULL);
}
