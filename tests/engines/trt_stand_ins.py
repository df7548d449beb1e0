"""Stand-ins for CUDA's runtime and TensorRT that compute on the host and keep what was called."""

from __future__ import annotations

import ctypes
import types
from typing import Any

import numpy as np

SHAPES: dict[str, tuple[int, ...]] = {
    "images": (-1, 3, 32, 48),
    "valid_sizes": (-1, 2),
    "original_sizes": (-1, 2),
    "boxes": (-1, 5, 4),
    "scores": (-1, 5),
    "labels": (-1, 5),
}
MASKS = {"masks": (-1, 5, 8, 12)}


class Error(int):
    name = "cudaErrorUnknown"


class Cuda:
    """CUDA's runtime over host memory: copies happen at once unless they are being recorded."""

    cudaHostAllocDefault = 0
    cudaStreamNonBlocking = 1
    cudaMemcpyKind = types.SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamCaptureMode = types.SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self, refuses_capture: bool = False) -> None:
        self.calls: list[str] = []
        self.blocks: dict[int, Any] = {}
        self.recording: list[Any] | None = None
        self.refuses_capture = refuses_capture
        self.events = 0

    def do(self, name: str, work: Any) -> tuple[Error]:
        if self.recording is not None:
            self.recording.append(work)
        else:
            self.calls.append(name)
            work()
        return (Error(0),)

    def _allocate(self, size: int) -> tuple[Error, int]:
        block = (ctypes.c_ubyte * size)()
        self.blocks[ctypes.addressof(block)] = block
        return Error(0), ctypes.addressof(block)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Error, int]:
        assert flags == self.cudaStreamNonBlocking, "the default stream could end a capture"
        return Error(0), 7

    def cudaGetLastError(self) -> tuple[Error]:
        self.calls.append("forget error")
        return (Error(0),)

    def cudaMalloc(self, size: int) -> tuple[Error, int]:
        return self._allocate(size)

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[Error, int]:
        return self._allocate(size)

    def cudaFree(self, pointer: int) -> tuple[Error]:
        del self.blocks[pointer]
        return (Error(0),)

    cudaFreeHost = cudaFree

    def cudaStreamDestroy(self, stream: int) -> tuple[Error]:
        self.calls.append("destroy stream")
        return (Error(0),)

    def cudaMemcpyAsync(
        self, to: int, source: int, size: int, kind: int, stream: int
    ) -> tuple[Error]:
        assert stream == 7
        way = {1: "upload", 2: "download"}[kind]
        return self.do(f"{way} {size}", lambda: ctypes.memmove(to, source, size))

    def cudaStreamSynchronize(self, stream: int) -> tuple[Error]:
        assert self.recording is None, "waited while recording"
        self.calls.append("wait")
        return (Error(0),)

    def cudaEventCreate(self) -> tuple[Error, list[float]]:
        self.events += 1
        return Error(0), [0.0]

    def cudaEventDestroy(self, event: list[float]) -> tuple[Error]:
        self.events -= 1
        return (Error(0),)

    def cudaEventRecord(self, event: list[float], stream: int) -> tuple[Error]:
        assert stream == 7 and self.recording is None
        event[0] = len(self.calls)
        return (Error(0),)

    def cudaEventSynchronize(self, event: list[float]) -> tuple[Error]:
        return (Error(0),)

    def cudaEventElapsedTime(self, start: list[float], end: list[float]) -> tuple[Error, float]:
        """As many milliseconds as there were calls between the two."""
        return Error(0), end[0] - start[0]

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[Error]:
        self.calls.append("record")
        self.recording = []
        return (Error(0),)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Error, Any]:
        recorded, self.recording = self.recording, None
        return Error(9 if self.refuses_capture else 0), recorded

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[Error, Any]:
        return Error(0), list(graph)

    def cudaGraphDestroy(self, graph: Any) -> tuple[Error]:
        return (Error(0),)

    def cudaGraphExecDestroy(self, graph: Any) -> tuple[Error]:
        self.calls.append("destroy graph")
        return (Error(0),)

    def cudaGraphLaunch(self, graph: Any, stream: int) -> tuple[Error]:
        self.calls.append("replay")
        for work in graph:
            work()
        return (Error(0),)


class Context:
    """Answers with the sum of each image as first score and the original size as first box."""

    capturable = True

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.batch = 0
        self.addresses: dict[str, int] = {}
        self.memory: int | None = None
        self.profiler: Any = None

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.batch = shape[0]
        assert shape[1:] == self.runtime.shapes[name][1:]
        return self.runtime.least <= self.batch <= self.runtime.most

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (self.batch, *self.runtime.shapes[name][1:])

    def set_device_memory(self, memory: int, size: int) -> None:
        assert len(self.runtime.cuda.blocks[memory]) >= size >= Runtime.device_memory_size_v2
        self.memory = memory

    def set_tensor_address(self, name: str, pointer: int) -> bool:
        self.addresses[name] = pointer
        return name in self.runtime.shapes

    def is_stream_capturable(self, stream: int) -> bool:
        return self.capturable

    def array(self, name: str) -> Any:
        shape = self.get_tensor_shape(name)
        dtype = np.dtype(self.runtime.dtypes.get(name, np.float32))
        size = int(np.prod(shape)) * dtype.itemsize
        memory = (ctypes.c_ubyte * size).from_address(self.addresses[name])
        return np.ctypeslib.as_array(memory).view(dtype).reshape(shape)

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 7 and set(self.addresses) == set(self.runtime.shapes)
        assert (self.memory is not None) == isinstance(self.runtime.module, FakeRtx)
        if self.runtime.cuda.recording is not None and self.runtime.module.refuses_recording:
            return False
        if self.runtime.fails:
            self.runtime.logger.log(types.SimpleNamespace(name="ERROR"), "out of luck")
            return False
        batch = self.batch

        def work() -> None:
            assert self.batch == batch, "a graph outlived the shapes it was recorded with"
            self.array("scores")[...] = self.array("images").sum((1, 2, 3))[:, None]
            self.array("boxes")[:, :, :2] = self.array("original_sizes")[:, None]
            self.array("labels")[...] = 3
            if self.runtime.module.masks:
                self.array("masks")[...] = self.array("images").sum(1)[:, None, ::4, ::4]
            if self.profiler is not None:
                self.profiler.report_layer_time("conv", 2.0)

        self.runtime.cuda.do(f"execute {batch}", work)
        return True


class Runtime:
    """The runtime and, to keep it short, also the engine."""

    device_memory_size_v2 = 1000

    def __init__(self, module: Fake, logger: Any) -> None:
        self.cuda, self.logger, self.module = module.cuda, logger, module
        self.least, self.most = module.batch
        self.shapes = {**SHAPES, **(MASKS if module.masks else {})}
        self.dtypes = {"labels": module.labels}
        self.fails = module.fails
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, data: bytes) -> Runtime | None:
        self.module.loaded.append(data)
        if data != b"good":
            self.logger.log(types.SimpleNamespace(name="ERROR"), "not an engine")
            return None
        return self

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        assert self.least != self.most, "a graph of a fixed batch may have no profile"
        rest = self.shapes[name][1:]
        return [(self.least, *rest), (self.least, *rest), (self.most, *rest)]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (self.least if self.least == self.most else -1, *self.shapes[name][1:])

    def get_tensor_dtype(self, name: str) -> Any:
        return self.dtypes.get(name, np.float32)

    def create_execution_context(self, runtime_config: Any = None) -> Context:
        rtx = isinstance(self.module, FakeRtx)
        assert (runtime_config is not None) == rtx, "TensorRT-RTX is told how to allocate"
        if runtime_config is not None:
            assert runtime_config.strategy == "user" and runtime_config.runtime_cache is not None
            assert runtime_config.dynamic_shapes_kernel_specialization_strategy == "eager"
        return Context(self)

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig(self.module)


class RuntimeCache:
    """Compiled kernels: empty, or what an earlier process left if it is of this release."""

    def __init__(self) -> None:
        self.content = b""

    def deserialize(self, data: bytes) -> bool:
        if not data.startswith(b"kernels"):
            return False
        self.content = data
        return True

    def serialize(self) -> bytes:
        return self.content or b"kernels, compiled just now"


class RuntimeConfig:
    """How a context of TensorRT-RTX shall behave."""

    def __init__(self, module: Fake) -> None:
        self.module = module
        self.strategy = self.runtime_cache = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache()

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.runtime_cache = cache
        self.module.caches.append(cache.content)
        return True


class Base:
    """What the bindings' base classes ask for: to be initialized by name."""

    def __init__(self) -> None:
        self.ready = True


class Fake(types.ModuleType):
    """A module as ``tensorrt`` is one."""

    ILogger = Base
    IProfiler = Base
    nptype = staticmethod(lambda dtype: dtype)

    def __init__(self, cuda: Cuda, batch: tuple[int, int] = (1, 4)) -> None:
        super().__init__("tensorrt")
        self.__version__ = "10.16.1.11"
        self.cuda, self.batch = cuda, batch
        self.labels: Any = np.int64
        self.fails = self.refuses_recording = self.masks = False
        self.loaded: list[bytes] = []
        self.caches: list[bytes] = []

    def Runtime(self, logger: Any) -> Runtime:
        assert logger.ready
        return Runtime(self, logger)


class FakeRtx(Fake):
    """A module as ``tensorrt_rtx`` is one."""

    ExecutionContextAllocationStrategy = types.SimpleNamespace(USER_MANAGED="user")
    DynamicShapesKernelSpecializationStrategy = types.SimpleNamespace(EAGER="eager")
