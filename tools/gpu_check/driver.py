"""The first GPU through the driver alone: needs cuda-bindings, and neither torch nor a runtime."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from engines.trt.cuda import HostArray, checked
from tools.gpu_check.part import Skipped

_UNTOUCHED = 0xFF  # of every byte a kernel has not written: no number as float, half and double


class Driver:
    """A context, a stream and memory: each array a block of its own, of exactly its size.

    Raises:
        Skipped: There are no bindings, no driver or no device.
    """

    def __init__(self) -> None:
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise Skipped(f"needs cuda-bindings ({error})") from error
        self._driver: Any = driver
        try:
            checked(driver.cuInit(0))
            device = checked(driver.cuDeviceGet(0))
        except RuntimeError as error:
            raise Skipped(f"no CUDA device ({error})") from error
        checked(driver.cuCtxPushCurrent(checked(driver.cuDevicePrimaryCtxRetain(device))))
        self._stream = checked(driver.cuStreamCreate(1))  # not waited for by the default stream

    @property
    def stream(self) -> int:
        """Handle of the stream."""
        return int(self._stream)

    def upload(self, array: HostArray) -> int:
        """Address of a copy of an array."""
        dense = np.ascontiguousarray(array)
        pointer = self._allocate(dense.nbytes)
        checked(self._driver.cuMemcpyHtoD(pointer, dense.ctypes.data, dense.nbytes))
        return pointer

    def room(self, like: HostArray, zeros: bool = False) -> int:
        """Address of room for an array, of zeros or of what nobody takes for a result."""
        pointer = self._allocate(like.nbytes)
        checked(self._driver.cuMemsetD8(pointer, 0 if zeros else _UNTOUCHED, like.nbytes))
        return pointer

    def download(self, pointer: int, like: HostArray) -> HostArray:
        """What lies at an address, once everything queued is done."""
        checked(self._driver.cuStreamSynchronize(self._stream))
        array = np.empty_like(like)
        checked(self._driver.cuMemcpyDtoH(array.ctypes.data, pointer, array.nbytes))
        return array

    def kernel(self, code: bytes, name: str) -> Any:
        """A kernel of PTX or machine code, compiled by the driver."""
        data = np.frombuffer(code + b"\0", np.uint8)
        library = checked(self._driver.cuLibraryLoadData(data.ctypes.data, [], [], 0, [], [], 0))
        kernel = checked(self._driver.cuLibraryGetKernel(library, name.encode()))
        return self._driver.CUfunction(int(kernel))

    def launch(self, kernel: Any, grid: int, block: int, arguments: Sequence[Any]) -> None:
        """Queues a kernel with arguments of ctypes' kinds."""
        pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        checked(
            self._driver.cuLaunchKernel(
                kernel, grid, 1, 1, block, 1, 1, 0, self.stream, ctypes.addressof(pointers), 0
            )
        )

    def _allocate(self, size: int) -> int:
        return int(checked(self._driver.cuMemAlloc(size)))
