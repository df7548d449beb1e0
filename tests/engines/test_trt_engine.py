"""The TensorRT runner against a stand-in for TensorRT and CUDA: buffers, graphs, batches, errors.

That the real libraries do what the stand-in does is for a machine with a GPU: ``make gpu-check``.
"""

from __future__ import annotations

import ctypes
import gc
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detr.data.preprocess import Inputs
from detr.errors import UserError
from engines.bundle import open_bundle
from engines.trt.backend import BACKENDS
from engines.trt.cuda import CudaError, Device
from engines.trt.engine import TrtEngine

SHAPES: dict[str, tuple[int, ...]] = {
    "images": (-1, 3, 32, 48),
    "valid_sizes": (-1, 2),
    "original_sizes": (-1, 2),
    "boxes": (-1, 5, 4),
    "scores": (-1, 5),
    "labels": (-1, 5),
}


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
        self.profiler: Any = None

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.batch = shape[0]
        assert shape[1:] == SHAPES[name][1:]
        return self.runtime.least <= self.batch <= self.runtime.most

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (self.batch, *SHAPES[name][1:])

    def set_tensor_address(self, name: str, pointer: int) -> bool:
        self.addresses[name] = pointer
        return name in SHAPES

    def is_stream_capturable(self, stream: int) -> bool:
        return self.capturable

    def array(self, name: str) -> Any:
        shape = self.get_tensor_shape(name)
        dtype = np.dtype(self.runtime.dtypes.get(name, np.float32))
        size = int(np.prod(shape)) * dtype.itemsize
        memory = (ctypes.c_ubyte * size).from_address(self.addresses[name])
        return np.ctypeslib.as_array(memory).view(dtype).reshape(shape)

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 7 and set(self.addresses) == set(SHAPES)
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
        rest = SHAPES[name][1:]
        return [(self.least, *rest), (self.least, *rest), (self.most, *rest)]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (self.least if self.least == self.most else -1, *SHAPES[name][1:])

    def get_tensor_dtype(self, name: str) -> Any:
        return self.dtypes.get(name, np.float32)

    def create_execution_context(self) -> Context:
        return Context(self)


class Base:
    """What the bindings' base classes ask for: to be initialised by name."""

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
        self.fails = self.refuses_recording = False
        self.loaded: list[bytes] = []

    def Runtime(self, logger: Any) -> Runtime:
        assert logger.ready
        return Runtime(self, logger)


MakeBundle = Callable[..., Path]
Make = Callable[..., tuple[TrtEngine, Cuda, Fake]]


def inputs(count: int, seed: int = 0) -> Inputs:
    generator = np.random.default_rng(seed)
    return Inputs(
        generator.random((count, 3, 32, 48), np.float32),
        np.full((count, 2), 20, np.float32),
        generator.random((count, 2), np.float32),
    )


@pytest.fixture
def make(toy_bundle: MakeBundle, tmp_path: Path) -> Make:
    def build(
        cuda: Cuda | None = None, name: str = "tensorrt", **changes: object
    ) -> tuple[TrtEngine, Cuda, Fake]:
        cuda = cuda or Cuda()
        module = Fake(cuda)
        for key, value in changes.items():
            setattr(module, key, value)
        data = module.__dict__.pop("data", b"good")
        path = tmp_path / "model.engine"
        bundle = tmp_path / "toy.bundle"
        opened = open_bundle(bundle if bundle.exists() else toy_bundle())
        device = Device(cuda)
        engine = TrtEngine(opened, path, data, BACKENDS[name], module, device, "REBUILD")
        return engine, cuda, module

    return build


def test_answers_and_keeps_the_batch(make: Make) -> None:
    engine, _, _ = make()
    assert engine.batch_size is None
    for count in (2, 4, 1, 2):
        batch = inputs(count, seed=count)
        raw = engine.run(batch)
        assert raw.scores.shape == (count, 5) and raw.boxes.shape == (count, 5, 4)
        np.testing.assert_allclose(raw.scores[:, 0], batch.images.sum((1, 2, 3)), rtol=1e-5)
        np.testing.assert_array_equal(raw.boxes[:, 3, :2], batch.original_sizes)
        assert raw.labels.dtype == np.int64 and (raw.labels == 3).all()


def test_results_outlive_the_next_run(make: Make) -> None:
    engine, _, _ = make()
    first = engine.run(inputs(2, seed=1))
    kept = first.scores.copy()
    engine.run(inputs(2, seed=2))
    np.testing.assert_array_equal(first.scores, kept)


def test_runs_once_then_records_then_replays(make: Make) -> None:
    engine, cuda, _ = make()
    engine.run(inputs(2))
    uploads = ["upload 36864", "upload 16", "upload 16"]
    downloads = ["download 160", "download 40", "download 80"]
    first = [*uploads, "execute 2", *downloads, "wait", "record", "replay", "wait"]
    assert cuda.calls == first and engine.cuda_graph
    engine.run(inputs(2))
    assert cuda.calls == [*first, "replay", "wait"]


def test_another_batch_size_is_recorded_anew(make: Make) -> None:
    engine, cuda, _ = make()
    for count in (2, 3, 2):
        engine.run(inputs(count))
    assert cuda.calls.count("record") == 3
    assert cuda.calls.count("destroy graph") == 2, "a graph of other shapes was kept"


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_what_cannot_be_recorded_is_run_each_time(
    make: Make, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    engine, cuda, _ = make(Cuda(refuses_capture=name == "tensorrt"), name)
    if name == "tensorrt-rtx":
        monkeypatch.setattr(Context, "capturable", False)
    batch = inputs(2)
    for _ in range(2):
        raw = engine.run(batch)
        np.testing.assert_allclose(raw.scores[:, 0], batch.images.sum((1, 2, 3)), rtol=1e-5)
    assert not engine.cuda_graph and "replay" not in cuda.calls
    assert ("cudaErrorUnknown" if name == "tensorrt" else "compile") in engine.no_cuda_graph
    assert cuda.calls.count("execute 2") == 3
    assert cuda.calls.count("record") == (1 if name == "tensorrt" else 0)


def test_an_engine_that_refuses_to_be_recorded_is_run_each_time(make: Make) -> None:
    engine, cuda, _ = make(refuses_recording=True)
    batch = inputs(2)
    for _ in range(2):
        raw = engine.run(batch)
        np.testing.assert_allclose(raw.scores[:, 0], batch.images.sum((1, 2, 3)), rtol=1e-5)
    assert not engine.cuda_graph and engine.no_cuda_graph
    assert cuda.recording is None and "forget error" in cuda.calls


def test_a_batch_larger_than_the_profile(make: Make) -> None:
    engine, _, _ = make()
    with pytest.raises(UserError, match="batch of 5 images, but it was built for 1 to 4") as error:
        engine.run(inputs(5))
    assert error.value.code == "batch-too-large"
    assert "REBUILD --profile-batch 1,1,5" in str(error.value)
    assert engine.run(inputs(1)).scores.shape == (1, 5)


def test_a_batch_smaller_than_the_profile_is_filled_up(make: Make) -> None:
    engine, cuda, _ = make(batch=(2, 4))
    batch = inputs(1)
    raw = engine.run(batch)
    assert "execute 2" in cuda.calls and raw.scores.shape == (1, 5)
    np.testing.assert_allclose(raw.scores[:, 0], batch.images.sum((1, 2, 3)), rtol=1e-5)


def test_a_static_batch_is_filled_up_and_refused_beyond(make: Make) -> None:
    engine, cuda, _ = make(batch=(3, 3))
    assert engine.batch_size == 3
    assert engine.run(inputs(1)).scores.shape == (1, 5)
    assert "execute 3" in cuda.calls
    with pytest.raises(UserError, match="exported for 3"):
        engine.run(inputs(4))


def test_labels_of_another_integer_type(make: Make) -> None:
    engine, _, _ = make(labels=np.int32)
    raw = engine.run(inputs(2))
    assert raw.labels.dtype == np.int64 and (raw.labels == 3).all()


def test_what_is_not_an_engine_is_refused(make: Make) -> None:
    with pytest.raises(UserError, match=r"10\.16\.1\.11 does not take it \(not an engine\)") as e:
        make(data=b"bad")
    assert e.value.code == "engine-unloadable" and "REBUILD" in str(e.value)


def test_a_failed_run_says_what_tensorrt_said(make: Make) -> None:
    engine, _, _ = make(fails=True)
    with pytest.raises(RuntimeError, match="out of luck"):
        engine.run(inputs(1))


def test_layers_are_timed_outside_the_graph(make: Make) -> None:
    engine, cuda, _ = make()
    engine.run(inputs(2))
    assert engine.profile_layers(inputs(2), runs=3) == {"conv": 2.0}
    assert cuda.calls.count("execute 2") == 1 + 4
    assert engine.run(inputs(2)).scores.shape == (2, 5)


def test_memory_is_counted_and_given_back(make: Make) -> None:
    engine, cuda, _ = make()
    assert engine.memory_bytes == 1000 + sum(len(b) for b in cuda.blocks.values()) // 2
    engine.run(inputs(1))
    del engine
    gc.collect()
    assert not cuda.blocks and {"destroy stream", "destroy graph"} <= set(cuda.calls)


def test_a_failed_call_is_not_swallowed() -> None:
    cuda = Cuda(refuses_capture=True)
    device = Device(cuda)
    with pytest.raises(CudaError, match="cudaErrorUnknown"):
        device.capture(lambda: None)
    assert cuda.recording is None


def test_the_bindings_have_every_call() -> None:
    bindings = pytest.importorskip("cuda.bindings.runtime")
    for name in vars(Cuda):
        if name.startswith("cuda"):
            assert hasattr(bindings, name), name
    assert bindings.cudaMemcpyKind.cudaMemcpyDeviceToHost == 2
    assert hasattr(bindings.cudaStreamCaptureMode, "cudaStreamCaptureModeThreadLocal")
