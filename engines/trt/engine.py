"""A bundle in TensorRT or TensorRT-RTX: pinned buffers, one stream, CUDA-graph replay; no torch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from detr.data.preprocess import Inputs
from detr.errors import UserError
from engines.base import Engine, RawDetections, filled
from engines.bundle import INPUTS, Bundle
from engines.evidence import trusted_artifact
from engines.trt import rtx
from engines.trt.backend import Backend, load
from engines.trt.check import Here, find_engine, here_platform, plugin_hash, rebuild_command
from engines.trt.cuda import Device, Graph, HostArray, compute_capability, no_device
from engines.trt.log import Log, make_logger, make_profiler


def open_trt(
    bundle: Bundle, backend: Backend, built: Path | None = None, ungated: bool = False
) -> TrtEngine:
    """Opens a bundle's engine for this machine; for :func:`engines.open.open_engine`.

    Args:
        bundle: Its folder holds the engine.
        backend: Whose engine.
        built: Folder of the engine; that of the bundle's that fits this machine where ``None``.
        ungated: Whether one the parity gate rejected or has not seen will do.

    Raises:
        UserError: ``tensorrt-missing``, ``tensorrt-version``, ``device-missing``, what
            :func:`engines.trt.check.find_engine` refuses, and ``artifact-changed`` where the
            engine is not the one its evidence speaks of.
    """
    trt = load(backend)
    capability = compute_capability()
    if capability is None:
        raise UserError(
            "device-missing",
            f"engine {backend.name} runs on a GPU: {no_device()}",
        )
    here = Here(trt.__version__, capability, plugin_hash(), here_platform())
    folder = built or find_engine(bundle, backend, here, ungated)[0]
    trusted = trusted_artifact(folder)
    evidence = trusted.evidence
    if evidence.status == "unverified" and not ungated:
        warnings.warn(
            f"{trusted.path}: never compared with the model it was built from; do it with: "
            f"detr export verify {bundle.path} --engine {backend.name}",
            stacklevel=4,
        )
    return TrtEngine(
        bundle,
        trusted.path,
        trusted.data,
        backend,
        trt,
        Device(),
        rebuild_command(bundle, backend, capability),
        evidence.build is not None and evidence.build.version_compatible,
    )


class TrtEngine(Engine):
    """An engine file whose evidence has been checked; see :func:`open_trt`.

    Args:
        bundle: The bundle it was built from.
        path: The engine.
        data: Its content, which was checked; the file is not read again.
        backend: Its runtime.
        trt: The runtime's module.
        device: Stream and memory.
        rebuild: Command that builds it anew, for messages.
        host_code: Whether the engine may bring code that runs on the host, as engines for other
            releases do.

    Attributes:
        cuda_graph: Whether the last batch was replayed from a CUDA graph.
        no_cuda_graph: Why it was not, once a batch has run.
    """

    on_gpu = True

    def __init__(
        self,
        bundle: Bundle,
        path: Path,
        data: bytes,
        backend: Backend,
        trt: Any,
        device: Device,
        rebuild: str,
        host_code: bool = False,
    ) -> None:
        self.name = backend.name
        self.info = bundle.info.model
        self._outputs, self._scaling = bundle.info.outputs, bundle.info.masks
        self.artifact = path
        self.versions = {backend.module: trt.__version__}
        self._trt, self._backend, self._device, self._rebuild = trt, backend, device, rebuild
        self._log = Log()
        self._logger = make_logger(trt, self._log)
        self._runtime = trt.Runtime(self._logger)
        self._runtime.engine_host_code_allowed = host_code
        engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise UserError(
                "engine-unloadable",
                f"{path}: {backend.name} {trt.__version__} does not take it "
                f"({self._last_error()}); build it again: {rebuild}",
            )
        self._engine = engine
        self._least, self._most = _batches(engine)
        self.batch_size = self._most if self._least == self._most else None
        self._cache = rtx.RuntimeCache(sha256(data).hexdigest()) if backend.names_targets else None
        self._context = self._new_context()
        if self._context is None:
            raise UserError(
                "engine-unloadable", f"{path}: not enough GPU memory ({self._last_error()})"
            )
        self._host: dict[str, HostArray] = {}
        self._pointers: dict[str, int] = {}
        self._allocate()
        self._batch = 0
        self._graph: Graph | None = None
        self.cuda_graph, self.no_cuda_graph = False, ""

    @property
    def memory_bytes(self) -> int:
        """Device memory the engine takes for activations, and its buffers; weights not counted."""
        buffers = sum(array.nbytes for array in self._host.values())
        return int(self._engine.device_memory_size_v2) + buffers

    def profile_layers(self, inputs: Inputs, runs: int = 20) -> dict[str, float]:
        """Mean milliseconds of each layer as TensorRT's own profiler sees them.

        Args:
            inputs: A batch, as for :meth:`run`.
            runs: How often to run it, after one run that is not counted.
        """
        times: dict[str, list[float]] = {}
        # A context of its own: the profiler stays with it and slows every run.
        context = self._new_context()
        if context is None:
            raise RuntimeError(f"{self.artifact}: no second context: {self._last_error()}")
        profiler = make_profiler(self._trt, times)
        context.profiler = profiler
        batch = max(len(inputs.images), self._least)
        self._bind(context, batch)
        self._fill_host(filled(inputs, batch))
        for _ in range(runs + 1):
            self._enqueue(context, batch)
            self._device.wait()
        return {name: float(np.mean(found[1:] or found)) for name, found in times.items()}

    def device_times(self, inputs: Inputs, runs: int) -> list[float] | None:
        """Milliseconds of the engine alone, replayed from a CUDA graph where :meth:`run` does so.

        Raises:
            RuntimeError: CUDA or TensorRT refused.
        """
        self.run(inputs)
        execute: Callable[[], None] = self._execute
        if self._graph is not None:
            execute = self._device.capture(self._execute).launch
        return self._device.milliseconds(execute, runs)

    def _infer(self, inputs: Inputs) -> RawDetections:
        count = len(inputs.images)
        if count > self._most:
            raise UserError(
                "batch-too-large",
                f"{self.artifact}: a batch of {count} images, but it was built for "
                f"{self._least} to {self._most}; build it again: {self._rebuild} "
                f"--profile-batch {self._least},{self._least},{count}",
            )
        batch = max(count, self._least)
        self._fill_host(filled(inputs, batch))
        if batch != self._batch:
            self._prepare(batch)
        if self._graph is not None:
            self._graph.launch()
        else:
            self._enqueue(self._context, batch)
        self._device.wait()
        found = {name: self._host[name][:count].copy() for name in self._outputs}
        types = {"labels": np.int64}
        outputs = [x.astype(types.get(name, np.float32), copy=False) for name, x in found.items()]
        return RawDetections.of(outputs, inputs, self._scaling)

    def _new_context(self) -> Any:
        if self._cache is None:
            return self._engine.create_execution_context()
        return rtx.create_context(self._trt, self._engine, self._device, self._cache)

    def _allocate(self) -> None:
        """Buffers for the largest batch; smaller ones use the front of them."""
        self._bind(self._context, self._most)
        for name in (*INPUTS, *self._outputs):
            shape = tuple(int(size) for size in self._context.get_tensor_shape(name))
            dtype = self._trt.nptype(self._engine.get_tensor_dtype(name))
            self._host[name] = self._device.pinned(shape, dtype)
            self._pointers[name] = self._device.memory(self._host[name].nbytes)

    def _bind(self, context: Any, batch: int) -> None:
        for name in INPUTS:
            rest = tuple(self._engine.get_tensor_shape(name))[1:]
            if not context.set_input_shape(name, (batch, *rest)):
                raise RuntimeError(f"{self.artifact}: {name}: {self._last_error()}")
        for name, pointer in self._pointers.items():
            if not context.set_tensor_address(name, pointer):
                raise RuntimeError(f"{self.artifact}: {name}: {self._last_error()}")

    def _prepare(self, batch: int) -> None:
        """Makes ready for a batch size and records its CUDA graph.

        One graph is kept: those of other batch sizes would be void once the context's shapes
        change.
        """
        self._graph, self._batch = None, 0
        self._bind(self._context, batch)
        # The first run after a change of shapes does work that must not be recorded.
        self._enqueue(self._context, batch)
        self._device.wait()
        self.no_cuda_graph = ""
        if self._cache is not None:
            self._cache.save()
        if self._cache is not None and not rtx.capturable(self._context, self._device.stream):
            self.no_cuda_graph = "the runtime may still compile or allocate"
        else:
            try:
                self._graph = self._device.capture(lambda: self._enqueue(self._context, batch))
            except RuntimeError as reason:
                # CUDA refuses the recording, or TensorRT does while one is going on.
                self.no_cuda_graph = str(reason)
        self.cuda_graph = self._graph is not None
        self._batch = batch

    def _fill_host(self, inputs: Inputs) -> None:
        arrays = (inputs.images, inputs.valid_sizes, inputs.original_sizes)
        for name, array in zip(INPUTS, arrays, strict=True):
            self._host[name][: len(array)] = array

    def _enqueue(self, context: Any, batch: int) -> None:
        """Queues the copies and the engine."""
        for name in INPUTS:
            self._device.upload(self._pointers[name], self._host[name][:batch])
        self._execute(context)
        for name in self._outputs:
            self._device.download(self._host[name][:batch], self._pointers[name])

    def _execute(self, context: Any = None) -> None:
        context = self._context if context is None else context
        if not context.execute_async_v3(self._device.stream):
            raise RuntimeError(f"{self.artifact}: {self._last_error()}")

    def _last_error(self) -> str:
        return self._log.last_error()


def _batches(engine: Any) -> tuple[int, int]:
    """Smallest and largest batch: the graph's own where it is fixed, else the profile's."""
    fixed = int(engine.get_tensor_shape(INPUTS[0])[0])
    if fixed > 0:
        return fixed, fixed
    low, _, high = engine.get_tensor_profile_shape(INPUTS[0], 0)
    return int(low[0]), int(high[0])
