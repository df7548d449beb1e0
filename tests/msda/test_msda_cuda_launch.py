"""What the CUDA path hands to the driver, with a driver that only takes notes."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any

import pytest

from detr.errors import UserError
from detr.msda import cuda_kernels
from detr.msda.cuda_source import Attention

ATTENTION = Attention("float16", 8, 32, 2, 4)
SHAPES = ((6, 9), (3, 5))


@dataclass
class Driver:
    """Reads the arguments of a launch from their addresses, as the real one does."""

    kinds: list[Any]
    launches: list[dict[str, Any]] = field(default_factory=list)

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
            {"function": function, "grid": grid, "block": block, "stream": stream, "values": values}
        )
        assert shared == 0 and extra == 0
        return (0,)


def driver(monkeypatch: pytest.MonkeyPatch, inputs: int, outputs: int, sizes: int) -> Driver:
    kinds: list[Any] = [ctypes.c_void_p] * inputs + [ctypes.c_int] * 2
    kinds += [ctypes.c_void_p] * outputs
    if sizes:
        kinds.append(ctypes.c_int * sizes)
    fake = Driver(kinds)
    monkeypatch.setattr(cuda_kernels, "_bindings", lambda: (fake, None))
    loaded = cuda_kernels._Loaded("forward kernel", "backward kernel")
    monkeypatch.setattr(cuda_kernels, "_load", lambda attention, capability: loaded)
    return fake


def test_forward_passes_inputs_sizes_output_and_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = driver(monkeypatch, 3, 1, 4)
    cuda_kernels.forward(ATTENTION, (9, 0), 77, (2, 5), [16, 32, 48], 64, SHAPES)
    (launch,) = fake.launches
    assert launch["function"] == "forward kernel" and launch["stream"] == 77
    # 2 x 5 x 8 groups of 4 threads each: 80 groups, 32 of them to a block of 128.
    assert launch["grid"] == (3, 1, 1) and launch["block"] == (128, 1, 1)
    assert launch["values"] == [16, 32, 48, 5, 80, 64, [6, 9, 3, 5]]


def test_backward_passes_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = driver(monkeypatch, 4, 3, 0)
    cuda_kernels.backward(ATTENTION, (9, 0), 0, (1, 3), [16, 32, 48, 64], [80, 96, 112])
    (launch,) = fake.launches
    assert launch["function"] == "backward kernel"
    assert launch["values"] == [16, 32, 48, 64, 3, 24, 80, 96, 112]


def test_no_queries_launch_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = driver(monkeypatch, 3, 1, 4)
    cuda_kernels.forward(ATTENTION, (9, 0), 0, (2, 0), [16, 32, 48], 64, SHAPES)
    assert not fake.launches


def test_a_refusal_of_the_driver_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    import enum

    error = enum.IntEnum("CUresult", {"CUDA_ERROR_INVALID_VALUE": 1})
    fake = driver(monkeypatch, 3, 1, 4)
    monkeypatch.setattr(fake, "cuLaunchKernel", lambda *_: (error(1),))
    with pytest.raises(RuntimeError, match="CUDA_ERROR_INVALID_VALUE"):
        cuda_kernels.forward(ATTENTION, (9, 0), 0, (1, 1), [16, 32, 48], 64, SHAPES)


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
