"""Which GPU there is and, where none can be used, why: no driver, an old one, no device."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest

from engines.trt import cuda

# Of CUDA's runtime, as the bindings name them.
CODES = {"cudaSuccess": 0, "cudaErrorInsufficientDriver": 35, "cudaErrorNoDevice": 100}
CODES |= {"cudaErrorSystemDriverMismatch": 803}


class Error(int):
    name: str


def error(name: str) -> Error:
    made = Error(CODES[name])
    made.name = name
    return made


def bindings(count: Any, driver: int = 13000) -> Any:
    """CUDA's runtime where ``cudaGetDeviceCount`` gives this, or raises it."""

    def devices() -> Any:
        if isinstance(count, Exception):
            raise count
        return (error("cudaSuccess"), count) if isinstance(count, int) else (error(count), None)

    attributes = types.SimpleNamespace(
        cudaDevAttrComputeCapabilityMajor=8, cudaDevAttrComputeCapabilityMinor=7
    )
    return types.SimpleNamespace(
        cudaGetDeviceCount=devices,
        cudaDriverGetVersion=lambda: (error("cudaSuccess"), driver),
        cudaDeviceAttr=attributes,
        cudaDeviceGetAttribute=lambda which, device: (error("cudaSuccess"), which),
    )


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def put(*arguments: Any, **options: Any) -> None:
        monkeypatch.setattr(cuda, "runtime", lambda: bindings(*arguments, **options))

    return put


def test_a_gpu(here: Callable[..., None]) -> None:
    here(1)
    assert cuda.compute_capability() == 87


@pytest.mark.parametrize(
    ("count", "driver", "words"),
    [
        (0, 13000, "no CUDA device here"),
        ("cudaErrorNoDevice", 13000, "no CUDA device here"),
        # What the runtime of cuda-bindings 12.9 and 13 says without a driver, whose version is 0.
        ("cudaErrorInsufficientDriver", 0, "no CUDA device here"),
        # cuda-bindings 12.8 raises instead.
        (RuntimeError("Failed to dlopen libcuda.so.1"), 0, "no CUDA device here"),
        ("cudaErrorSystemDriverMismatch", 13000, "can be used here (cudaErrorSystemDriverMismatch"),
    ],
)
def test_no_gpu(here: Callable[..., None], count: Any, driver: int, words: str) -> None:
    here(count, driver)
    assert cuda.compute_capability() is None
    assert words in cuda.no_device()


def test_an_old_driver_is_not_a_missing_gpu(here: Callable[..., None]) -> None:
    pytest.importorskip("cuda.bindings")
    here("cudaErrorInsufficientDriver", 12020)
    assert cuda.compute_capability() is None
    told = cuda.no_device()
    assert "driver here is too old: it serves CUDA 12.2" in told and "no CUDA device" not in told
    assert "update the driver or pip install 'cuda-bindings<13'" in told
