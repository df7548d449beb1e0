"""The TensorRT runner on the real device, around a stand-in for TensorRT.

Everything of the runner that is CUDA's is real: page-locked memory, the stream, recording and
replay, events. What stands in for an engine copies from its inputs to its outputs on the device, so
that each answer shows which inputs it was computed from.
"""

from __future__ import annotations

import types
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from detr.data.preprocess import Inputs
from detr.errors import UserError
from engines.bundle import OUTPUTS
from engines.trt.backend import BACKENDS
from engines.trt.cuda import CudaError, Device, compute_capability, runtime
from engines.trt.engine import TrtEngine
from tools.gpu_check.part import Cases, Parts, Setting, Skipped

LEAST, MOST = 1, 4
DETECTIONS = 300
IMAGE = (3, 96, 320)
_SHAPES: dict[str, tuple[int, ...]] = {
    "images": IMAGE,
    "valid_sizes": (2,),
    "original_sizes": (2,),
    "boxes": (DETECTIONS, 4),
    "scores": (DETECTIONS,),
    "labels": (DETECTIONS,),
}


class Context:
    """Answers with the first bytes of the images, copied on the device.

    Attributes:
        waits: Whether it waits for the stream, which cannot be recorded.
        fails: Whether it refuses to run.
    """

    waits = fails = False

    def __init__(self, cudart: Any) -> None:
        self._cudart = cudart
        self._batch = 0
        self._addresses: dict[str, int] = {}
        self.profiler: Any = None

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._batch = shape[0]
        return shape[1:] == _SHAPES[name]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (self._batch, *_SHAPES[name])

    def set_tensor_address(self, name: str, pointer: int) -> bool:
        self._addresses[name] = pointer
        return True

    def execute_async_v3(self, stream: int) -> bool:
        if self.fails:
            return False
        way = self._cudart.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        for name in ("boxes", "scores", "labels"):
            size = int(np.prod(self.get_tensor_shape(name))) * _kind(name).itemsize
            source, target = self._addresses["images"], self._addresses[name]
            (error,) = self._cudart.cudaMemcpyAsync(target, source, size, way, stream)
            if int(error) != 0:
                return False
        if self.waits and int(self._cudart.cudaStreamSynchronize(stream)[0]) != 0:
            return False
        if self.profiler is not None:
            self.profiler.report_layer_time("copy", 1.0)
        return True


class TensorRt:
    """What the runner asks of TensorRT's module, of a runtime and of an engine."""

    __version__ = "stand-in"
    device_memory_size_v2 = 0
    engine_host_code_allowed = False
    nptype = staticmethod(np.dtype)

    class ILogger:
        """Base class of loggers."""

    class IProfiler:
        """Base class of profilers."""

    def __init__(self, cudart: Any) -> None:
        self._cudart = cudart
        self.contexts: list[Context] = []

    def Runtime(self, logger: Any) -> TensorRt:
        return self

    def deserialize_cuda_engine(self, data: bytes) -> TensorRt:
        return self

    def create_execution_context(self) -> Context:
        self.contexts.append(Context(self._cudart))
        return self.contexts[-1]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, *_SHAPES[name])

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [(size, *_SHAPES[name]) for size in (LEAST, LEAST, MOST)]

    def get_tensor_dtype(self, name: str) -> np.dtype[Any]:
        return _kind(name)


def _kind(name: str) -> np.dtype[Any]:
    return np.dtype(np.int64 if name == "labels" else np.float32)


def runner(setting: Setting) -> Parts:
    """Batches, recording, what cannot be recorded, the device's own clock, memory given back."""
    if setting.device == "cpu":
        return {"runner": partial(_skipped, "needs CUDA")}
    return {"runner": check}


def _skipped(reason: str) -> None:
    raise Skipped(reason)


def check(cudart: Any = None) -> str:
    """All of it; ``cudart`` is another module in the place of CUDA's bindings, for tests."""
    if cudart is None:
        cudart = runtime()
        if compute_capability() is None:
            raise Skipped("no CUDA device")
    cases = Cases()
    for case in (batches, not_recordable, failing, clocked, profiled, given_back):
        cases.run(case.__name__, partial(case, cudart), 0)
    return cases.finish()


def opened(cudart: Any) -> tuple[TrtEngine, TensorRt]:
    """A runner around the stand-in."""
    trt: Any = TensorRt(cudart)
    info = types.SimpleNamespace(model=None, outputs=OUTPUTS, masks=None)
    bundle: Any = types.SimpleNamespace(info=info)
    engine = TrtEngine(
        bundle, Path("stand-in"), b"", BACKENDS["tensorrt"], trt, Device(cudart), "REBUILD"
    )
    return engine, trt


def _inputs(batch: int, seed: int) -> Inputs:
    rng = np.random.default_rng(seed)
    images = rng.standard_normal((batch, *IMAGE)).astype(np.float32)
    return Inputs(images, np.ones((batch, 2), np.float32), np.ones((batch, 2), np.float32))


def _wrong(engine: TrtEngine, batch: int, seed: int) -> float:
    """How many numbers of an answer are not its inputs'."""
    inputs = _inputs(batch, seed)
    raw = engine.run(inputs)
    count = 0
    for name in ("boxes", "scores", "labels"):
        found = getattr(raw, name)
        wanted = np.frombuffer(inputs.images.tobytes(), found.dtype, found.size)
        count += int((found.reshape(-1).view(np.uint8) != wanted.view(np.uint8)).sum())
    return float(count)


def batches(cudart: Any) -> dict[str, float]:
    """Each size after each other one, twice: run once, recorded, replayed on other images."""
    engine, _ = opened(cudart)
    wrong, seed = 0.0, 0
    for batch in (1, 4, 2, 4, 3, 1):
        for _ in range(3):
            seed += 1
            wrong += _wrong(engine, batch, seed)
        if not engine.cuda_graph:
            raise RuntimeError(f"not recorded: {engine.no_cuda_graph}")
    try:
        engine.run(_inputs(MOST + 1, 0))
    except UserError as error:
        return {"wrong": wrong, "not refused": float(error.code != "batch-too-large")}
    return {"wrong": wrong, "not refused": 1.0}


def not_recordable(cudart: Any) -> dict[str, float]:
    """What waits cannot be recorded: it runs each time, and the stream is usable again."""
    engine, trt = opened(cudart)
    trt.contexts[0].waits = True
    wrong = sum(_wrong(engine, 2, seed) for seed in range(3))
    recorded = float(engine.cuda_graph or not engine.no_cuda_graph)
    trt.contexts[0].waits = False
    wrong += _wrong(engine, 3, 9)
    return {"wrong": wrong, "recorded": recorded, "never after": float(not engine.cuda_graph)}


def failing(cudart: Any) -> dict[str, float]:
    """A run that is refused says so, and the next one is right."""
    engine, trt = opened(cudart)
    trt.contexts[0].fails = True
    try:
        engine.run(_inputs(2, 0))
        told = 1.0
    except RuntimeError:
        told = 0.0
    trt.contexts[0].fails = False
    return {"not told": told, "wrong": _wrong(engine, 2, 1)}


def clocked(cudart: Any) -> dict[str, float]:
    """Times of replays are positive, and the runner answers as before."""
    engine, _ = opened(cudart)
    times = engine.device_times(_inputs(2, 0), 5)
    odd = sum(not 0 < time < 1000 for time in times or [0.0])
    return {"odd times": float(odd), "wrong": _wrong(engine, 2, 1)}


def profiled(cudart: Any) -> dict[str, float]:
    """A second context beside the first one's recording."""
    engine, _ = opened(cudart)
    wrong = _wrong(engine, 2, 0)
    layers = engine.profile_layers(_inputs(3, 1), runs=2)
    return {"no layer": float(layers != {"copy": 1.0}), "wrong": wrong + _wrong(engine, 2, 2)}


def given_back(cudart: Any) -> dict[str, float]:
    """A runner that is dropped leaves its memory: twenty of them take no more than a few."""

    def free() -> int:
        error, size, _ = cudart.cudaMemGetInfo()
        if int(error) != 0:
            raise CudaError(f"cudaMemGetInfo {error}")
        return int(size)

    for _ in range(3):
        _wrong(opened(cudart)[0], MOST, 0)
    before = free()
    for _ in range(20):
        _wrong(opened(cudart)[0], MOST, 0)
    of_one = MOST * 4 * int(np.prod(IMAGE))
    return {"engines kept": float(max(0, before - free()) // (5 * of_one))}
