"""CUDA as far as the runner needs it, through ``cuda-bindings``: no torch, no toolkit."""

from __future__ import annotations

from functools import cache
from typing import Any

from detr.errors import UserError


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
        RuntimeError: The call failed.
    """
    error, *values = result
    if int(error) != 0:
        raise RuntimeError(f"{type(error).__name__} {error.name}")
    return values[0] if values else None


def compute_capability() -> int | None:
    """The first GPU's compute capability as one number (86), ``None`` without a GPU."""
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
    except RuntimeError:  # no driver, or one that is too old
        return None
    return 10 * int(major) + int(minor)
