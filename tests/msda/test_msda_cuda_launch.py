"""What the CUDA path hands to the driver, with a driver that only takes notes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from detr.errors import UserError
from detr.msda import cuda_kernels
from detr.msda.cuda_source import Attention

ATTENTION = Attention("float16", 8, 32, 2, 4)
SHAPES = ((6, 9), (3, 5))


@dataclass
class Driver:
    """Reads the arguments of a launch from their addresses, as the real one does.

    The context of device n is n + 1; 0 is none.
    """

    kinds: list[Any]
    context: int = 0
    launches: list[dict[str, Any]] = field(default_factory=list)
    pushed: list[int] = field(default_factory=list)
    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=9,
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=0,
    )

    def cuDeviceGet(self, device: int) -> tuple[int, int]:
        return 0, device

    def cuDeviceGetAttribute(self, attribute: int, device: int) -> tuple[int, int]:
        return 0, attribute

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[int, int]:
        return 0, device + 1

    def cuCtxGetCurrent(self) -> tuple[int, int]:
        return 0, self.context

    def cuCtxPushCurrent(self, context: int) -> tuple[int]:
        self.pushed.append(self.context)
        self.context = context
        return (0,)

    def cuCtxPopCurrent(self) -> tuple[int, int]:
        popped, self.context = self.context, self.pushed.pop()
        return 0, popped

    def cuLaunchKernel(self, function: object, *rest: int) -> tuple[int]:
        grid, block, shared, stream, parameters, extra = (
            rest[:3], rest[3:6], rest[6], rest[7], rest[8], rest[9],
        )  # fmt: skip
        pointers = (ctypes.c_void_p * len(self.kinds)).from_address(parameters)
        values = []
        for pointer, kind in zip(pointers, self.kinds, strict=True):
            assert pointer is not None
            found = kind.from_address(pointer)
            values.append(list(found) if hasattr(found, "__len__") else found.value)
        self.launches.append(
            {
                "function": function,
                "context": self.context,
                "grid": grid,
                "block": block,
                "stream": stream,
                "values": values,
            }
        )
        assert shared == 0 and extra == 0
        return (0,)


Make = Callable[[int, int, int], Driver]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Makes a driver for launches with so many inputs, outputs and level sizes."""
    cached = (cuda_kernels._capability, cuda_kernels._primary_context)

    def make(inputs: int, outputs: int, sizes: int) -> Driver:
        kinds: list[Any] = [ctypes.c_void_p] * inputs + [ctypes.c_int] * 2
        kinds += [ctypes.c_void_p] * outputs
        if sizes:
            kinds.append(ctypes.c_int * sizes)
        fake = Driver(kinds)
        monkeypatch.setattr(cuda_kernels, "_bindings", lambda: (fake, None))

        def load(attention: Attention, capability: tuple[int, int]) -> cuda_kernels._Loaded:
            assert capability == (9, 0)
            return cuda_kernels._Loaded(
                "forward kernel", "backward kernel", attention.threads, attention.groups_per_block
            )

        monkeypatch.setattr(cuda_kernels, "_load", load)
        return fake

    for function in cached:
        function.cache_clear()
    yield make
    for function in cached:
        function.cache_clear()


def test_forward_passes_inputs_sizes_output_and_levels(driver: Make) -> None:
    fake = driver(3, 1, 4)
    cuda_kernels.forward(ATTENTION, 0, 77, (2, 5), [16, 32, 48], 64, SHAPES)
    (launch,) = fake.launches
    assert launch["function"] == "forward kernel" and launch["stream"] == 77
    # 2 x 5 x 8 groups of 4 threads each: 80 groups, 32 of them to a block of 128.
    assert launch["grid"] == (3, 1, 1) and launch["block"] == (128, 1, 1)
    assert launch["values"] == [16, 32, 48, 5, 80, 64, [6, 9, 3, 5]]


def test_backward_passes_its_arguments(driver: Make) -> None:
    fake = driver(4, 3, 0)
    cuda_kernels.backward(ATTENTION, 0, 0, (1, 3), [16, 32, 48, 64], [80, 96, 112])
    (launch,) = fake.launches
    assert launch["function"] == "backward kernel"
    assert launch["values"] == [16, 32, 48, 64, 3, 24, 80, 96, 112]


@pytest.mark.parametrize("before", [0, 1, 2])
def test_a_launch_runs_in_its_devices_context_and_leaves_the_threads(
    driver: Make, before: int
) -> None:
    """Also in a thread that has no context yet, or that of another device."""
    fake = driver(3, 1, 4)
    fake.context = before
    cuda_kernels.forward(ATTENTION, 1, 0, (1, 1), [16, 32, 48], 64, SHAPES)
    assert [launch["context"] for launch in fake.launches] == [2]
    assert fake.context == before


def test_no_queries_launch_nothing(driver: Make) -> None:
    fake = driver(3, 1, 4)
    cuda_kernels.forward(ATTENTION, 0, 0, (2, 0), [16, 32, 48], 64, SHAPES)
    assert not fake.launches


def test_more_triples_than_32_bits_count_are_refused(driver: Make) -> None:
    fake = driver(3, 1, 4)
    with pytest.raises(ValueError, match="at most"):
        cuda_kernels.forward(ATTENTION, 0, 0, (2**14, 2**14), [16, 32, 48], 64, SHAPES)
    assert not fake.launches


def test_a_refusal_of_the_driver_is_not_swallowed(
    driver: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    import enum

    error = enum.IntEnum("CUresult", {"CUDA_ERROR_INVALID_VALUE": 1})
    fake = driver(3, 1, 4)
    monkeypatch.setattr(fake, "cuLaunchKernel", lambda *_: (error(1),))
    with pytest.raises(RuntimeError, match="CUDA_ERROR_INVALID_VALUE"):
        cuda_kernels.forward(ATTENTION, 0, 0, (1, 1), [16, 32, 48], 64, SHAPES)
    assert fake.context == 0


def test_a_source_that_does_not_compile_shows_the_compilers_words() -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    with pytest.raises(RuntimeError, match=r"(?s)NVRTC, compute_80.*each thread takes"):
        source = ATTENTION.source.replace("MSDA_CHANNELS 32", "MSDA_CHANNELS 33")
        cuda_kernels._compile_text(source, "compute_80", "PTX")


def test_without_bindings_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    cuda_kernels._bindings.cache_clear()
    try:
        with pytest.raises(UserError, match=r"detr-distillery\[gpu\]"):
            cuda_kernels.require()
    finally:
        cuda_kernels._bindings.cache_clear()
