"""CUDA as far as the runner needs it, through ``cuda-bindings``: no torch, no toolkit."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from detr.errors import UserError

HostArray = npt.NDArray[Any]


class CudaError(RuntimeError):
    """A call of CUDA's runtime failed."""


@cache
def runtime() -> Any:
    """The bindings of CUDA's runtime API.

    Raises:
        UserError: ``cuda-bindings-missing``.
    """
    try:
        from cuda.bindings import runtime as bindings
    except ImportError as reason:
        raise UserError(
            "cuda-bindings-missing",
            f"TensorRT engines need cuda-bindings: pip install 'detr-distillery[rtx]' ({reason})",
        ) from reason
    return bindings


def checked(result: tuple[Any, ...]) -> Any:
    """The value of a binding's (error, value...) tuple.

    Raises:
        CudaError: The call failed.
    """
    error, *values = result
    if int(error) != 0:
        raise CudaError(f"{type(error).__name__} {error.name}")
    return values[0] if values else None


def compute_capability() -> int | None:
    """The first GPU's compute capability as one number (86), ``None`` where none can be used."""
    cudart = runtime()
    try:
        if not checked(cudart.cudaGetDeviceCount()):
            return None
        attribute = cudart.cudaDeviceAttr
        major, minor = (
            checked(cudart.cudaDeviceGetAttribute(which, 0))
            for which in (
                attribute.cudaDevAttrComputeCapabilityMajor,
                attribute.cudaDevAttrComputeCapabilityMinor,
            )
        )
    except RuntimeError:  # no driver, an old one; cuda-bindings 12.8 raises one that is not ours
        return None
    return 10 * int(major) + int(minor)


def no_device() -> str:
    """Why :func:`compute_capability` found no GPU to use, one phrase."""
    cudart = runtime()
    try:
        error, *_ = cudart.cudaGetDeviceCount()
        driver = int(checked(cudart.cudaDriverGetVersion()))
    except RuntimeError:
        return "no CUDA device here"
    if error.name == "cudaErrorInsufficientDriver" and driver:  # 0 where there is no driver
        from cuda.bindings import __version__

        return (
            f"the NVIDIA driver here is too old: it serves CUDA {driver // 1000}."
            f"{driver % 1000 // 10}, cuda-bindings {__version__} is newer; update the driver or "
            f"pip install 'cuda-bindings<{driver // 1000 + 1}'"
        )
    if error.name not in ("cudaSuccess", "cudaErrorNoDevice", "cudaErrorInsufficientDriver"):
        return f"no CUDA device can be used here ({error.name})"
    return "no CUDA device here"


class Device:
    """A stream of the first GPU with memory that lives as long as this object.

    Args:
        cudart: Bindings of the runtime API; the real ones where ``None``.
    """

    def __init__(self, cudart: Any = None) -> None:
        cudart = cudart if cudart is not None else runtime()
        # One the default stream does not wait for: what others queue there would end a capture.
        stream = checked(cudart.cudaStreamCreateWithFlags(cudart.cudaStreamNonBlocking))
        self._cudart, self._stream = cudart, stream
        # Taken from the end: memory goes first, the stream last. Nothing here may hold self.
        self._free: list[Callable[[], Any]] = [lambda: cudart.cudaStreamDestroy(stream)]
        self._finalizer = weakref.finalize(self, _release, self._free)

    @property
    def stream(self) -> int:
        """Handle of the stream."""
        return int(self._stream)

    def memory(self, size: int) -> int:
        """Address of ``size`` bytes on the device."""
        pointer = checked(self._cudart.cudaMalloc(size))
        cudart = self._cudart
        self._free.append(lambda: cudart.cudaFree(pointer))
        return int(pointer)

    def pinned(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> HostArray:
        """An array in page-locked memory, which alone is copied without waiting; zeros."""
        kind = np.dtype(dtype)
        size = int(np.prod(shape)) * kind.itemsize
        pointer = checked(self._cudart.cudaHostAlloc(size, self._cudart.cudaHostAllocDefault))
        cudart = self._cudart
        self._free.append(lambda: cudart.cudaFreeHost(pointer))
        memory = (ctypes.c_ubyte * size).from_address(int(pointer))
        array: HostArray = np.ctypeslib.as_array(memory).view(kind).reshape(shape)
        array[...] = 0
        return array

    def upload(self, pointer: int, array: HostArray) -> None:
        """Queues a copy to the device."""
        self._copy(pointer, array.ctypes.data, array.nbytes, "cudaMemcpyHostToDevice")

    def download(self, array: HostArray, pointer: int) -> None:
        """Queues a copy from the device."""
        self._copy(array.ctypes.data, pointer, array.nbytes, "cudaMemcpyDeviceToHost")

    def _copy(self, to: int, source: int, size: int, kind: str) -> None:
        way = getattr(self._cudart.cudaMemcpyKind, kind)
        checked(self._cudart.cudaMemcpyAsync(to, source, size, way, self._stream))

    def wait(self) -> None:
        """Returns when everything queued is done."""
        checked(self._cudart.cudaStreamSynchronize(self._stream))

    def milliseconds(self, work: Callable[[], None], runs: int) -> list[float]:
        """Times each run of what ``work`` queues, on the device's own clock."""
        cudart = self._cudart
        events = [checked(cudart.cudaEventCreate()) for _ in range(2)]
        try:
            times = []
            for _ in range(runs):
                checked(cudart.cudaEventRecord(events[0], self._stream))
                work()
                checked(cudart.cudaEventRecord(events[1], self._stream))
                checked(cudart.cudaEventSynchronize(events[1]))
                times.append(float(checked(cudart.cudaEventElapsedTime(*events))))
            return times
        finally:
            for event in events:
                cudart.cudaEventDestroy(event)

    def capture(self, work: Callable[[], None]) -> Graph:
        """Records what ``work`` queues instead of doing it.

        Raises:
            CudaError: Something in it cannot be recorded; the stream is usable again. What ``work``
                raises is passed on, the stream likewise.
        """
        cudart = self._cudart
        mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        checked(cudart.cudaStreamBeginCapture(self._stream, mode))
        try:
            work()
        except BaseException:
            # A stream left capturing refuses everything else, and the error it ended with would
            # be taken for one of the next kernel's.
            error, graph = cudart.cudaStreamEndCapture(self._stream)
            if int(error) == 0:
                cudart.cudaGraphDestroy(graph)
            cudart.cudaGetLastError()
            raise
        try:
            graph = checked(cudart.cudaStreamEndCapture(self._stream))
            try:
                return Graph(cudart, checked(cudart.cudaGraphInstantiate(graph, 0)), self._stream)
            finally:
                cudart.cudaGraphDestroy(graph)
        except CudaError:
            cudart.cudaGetLastError()
            raise

    def close(self) -> None:
        """Gives stream and memory back; arrays of :meth:`pinned` must not be used after it."""
        self._finalizer()


class Graph:
    """Work recorded on a stream, ready to be replayed with one call."""

    def __init__(self, cudart: Any, executable: Any, stream: Any) -> None:
        self._cudart, self._executable, self._stream = cudart, executable, stream
        self._finalizer = weakref.finalize(self, cudart.cudaGraphExecDestroy, executable)

    def launch(self) -> None:
        """Queues the recorded work."""
        checked(self._cudart.cudaGraphLaunch(self._executable, self._stream))


def _release(free: list[Callable[[], Any]]) -> None:
    while free:
        free.pop()()
