"""Multi-scale deformable attention on the CPU, without torch.

``forward`` and ``backward`` take numpy arrays or anything that speaks DLPack (torch CPU tensors,
ONNX Runtime's OrtValues) and run the compiled kernel; where the package was installed without a
compiler they run in numpy, warn once, and are about a thousand times slower.

Shape legend: B batch, S tokens of all levels, M heads, D channels of a head, Q queries, V levels,
P points of a level, K samples of all levels where their numbers differ.
Source: Zhu et al., "Deformable DETR", arXiv 2010.04159, equation 3.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np

from detr.cores import default_threads, usable_cores
from detr.msda import fallback
from detr.msda.check import Sizes, check_like, check_sizes, dtype_name

__all__ = ["backward", "forward", "instruction_set", "native_available"]

Shapes = Sequence[Sequence[int]]

_CACHE_LINE = 64
_DLPACK_CPU = 1  # of its DLDeviceType


@cache
def _kernel() -> ModuleType | None:
    """The compiled module, or nothing (and one warning) where it was not built."""
    try:
        module = import_module("detr.msda._native")
    except ImportError as reason:
        warnings.warn(
            "detr was installed without its compiled kernel: deformable attention runs in numpy "
            "or grid_sample, 30 to 1000 times slower. Install a C++ compiler and reinstall detr "
            f"({reason})",
            RuntimeWarning,
            stacklevel=3,
        )
        return None
    return module


def native_available() -> bool:
    """Whether the compiled kernel is there; warns, once, if it is not."""
    return _kernel() is not None


def instruction_set() -> str:
    """What the kernel runs on here: ``avx512``, ``avx2``, ``baseline``, or ``numpy`` without it."""
    native = _kernel()
    return "numpy" if native is None else str(native.targets()[-1])


def _dense(array: Any) -> Any:
    """The array as the kernel takes it: on the CPU, dense, and copied only if it is not."""
    if isinstance(array, np.ndarray):
        array = np.ascontiguousarray(array)
        # numpy cannot hand its extension type bfloat16 over; its bits it can.
        return array.view(np.uint16) if array.dtype.name == "bfloat16" else array
    if hasattr(array, "is_contiguous"):  # a torch tensor, also bfloat16 or part of a graph
        return array.detach().contiguous()
    return np.ascontiguousarray(np.from_dlpack(array))


def _target(name: str, array: Any, shape: tuple[int, ...], dtype: str) -> Any:
    """An output given by the caller, which has to be right as it is."""
    if not isinstance(array, np.ndarray) and not hasattr(array, "is_contiguous"):
        raise TypeError(f"{name} must be a numpy array or a torch tensor")
    _check_on_cpu(name, array)
    check_like(name, array, shape, dtype)
    if isinstance(array, np.ndarray):
        dense = array.flags.c_contiguous and array.flags.writeable
    else:
        dense = array.is_contiguous()
    if not dense:
        raise ValueError(f"{name} must be contiguous and writable")
    return (
        array.view(np.uint16)
        if dtype_name(array) == "bfloat16" and isinstance(array, np.ndarray)
        else array
    )


def _as_numpy(array: Any) -> Any:
    """The array's own memory as a numpy array, for the fallback."""
    if isinstance(array, np.ndarray):
        return array
    if not hasattr(array, "detach"):
        return np.from_dlpack(array)
    if dtype_name(array) != "bfloat16":
        return array.detach().numpy()
    import ml_dtypes  # comes with onnx
    import torch

    return array.detach().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)


def _empty(shape: tuple[int, ...], like: Any) -> Any:
    """A numpy array of the type of ``like``, on a cache line's start as the kernel likes it."""
    if not isinstance(like, np.ndarray) and dtype_name(like) == "bfloat16":
        raise TypeError("numpy has no bfloat16: give the result's array with out=")
    dtype = like.dtype if isinstance(like, np.ndarray) else np.dtype(dtype_name(like))
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _CACHE_LINE, np.uint8)
    start = -memory.ctypes.data % _CACHE_LINE
    return memory[start : start + size].view(dtype).reshape(shape)


def _arrays(**arrays: Any) -> Iterator[Any]:
    """Turns what is neither numpy nor torch into numpy, so that it has a shape and a type.

    Raises:
        TypeError: An array is not on the CPU.
    """
    for name, array in arrays.items():
        _check_on_cpu(name, array)
        known = hasattr(array, "shape") and hasattr(array, "dtype")
        yield array if known else np.from_dlpack(array)


def _check_on_cpu(name: str, array: Any) -> None:
    if isinstance(array, np.ndarray):
        return
    if hasattr(array, "is_contiguous"):  # torch, which has devices that DLPack does not know
        here, device = array.device.type == "cpu", array.device
    elif hasattr(array, "__dlpack_device__"):
        device = array.__dlpack_device__()
        here = int(device[0]) == _DLPACK_CPU
    else:
        raise TypeError(f"{name} must be a numpy array or speak DLPack, not {type(array).__name__}")
    if not here:
        raise TypeError(f"{name} is on device {device}; detr.msda works on the CPU")


def forward(
    value: Any,
    shapes: Shapes,
    locations: Any,
    weights: Any,
    out: Any = None,
    threads: int | None = None,
    points: Sequence[int] | None = None,
) -> Any:
    """Samples the values and sums them.

    Args:
        value: ``[B, S, M, D]`` float16, bfloat16, float32 or float64.
        shapes: (height, width) of each level, finest first; S is the sum of their products.
        locations: ``[B, Q, M, V, P, 2]`` float32 (x, y) in [0, 1]; float64 where value is float64.
            What lies outside a level, infinite and NaN included, counts as zero.
        weights: ``[B, Q, M, V, P]``, the type of ``locations``.
        out: ``[B, Q, M * D]`` array of value's type to write to; a new numpy array by default.
        threads: Threads to use; by default ``OMP_NUM_THREADS``, or all cores this process may use.
        points: Number of points of each level where they are unequal. Locations are then
            ``[B, Q, M, K, 2]`` and weights ``[B, Q, M, K]``, level after level.

    Returns:
        ``out``.

    Raises:
        ValueError: Shapes that do not fit each other.
        TypeError: Types the kernel does not take, or arrays that are not on the CPU.
    """
    value, locations, weights = _arrays(value=value, locations=locations, weights=weights)
    sizes = check_sizes(value, shapes, locations, weights, points)
    if out is None:
        out = _empty(sizes.out, value)
    target = _target("out", out, sizes.out, dtype_name(value))
    native = _kernel()
    if native is None:
        result = fallback.forward(sizes, _as_numpy(value), _as_numpy(locations), _as_numpy(weights))
        _as_numpy(out)[...] = result.reshape(sizes.out)
        return out
    native.forward(
        _dense(value),
        sizes.shapes,
        _dense(locations),
        _dense(weights),
        target,
        threads or default_threads() or usable_cores(),
        points=sizes.points if points is not None else (),
    )
    return out


def backward(
    grad_out: Any,
    value: Any,
    shapes: Shapes,
    locations: Any,
    weights: Any,
    out: tuple[Any, Any, Any] | None = None,
    threads: int | None = None,
    points: Sequence[int] | None = None,
) -> tuple[Any, Any, Any]:
    """Gradients of :func:`forward`; the same bits each time, whatever the number of threads.

    Args:
        grad_out: ``[B, Q, M * D]``, the type of ``value``.
        value: As in :func:`forward`, like the next three.
        shapes: The levels.
        locations: Where it was sampled.
        weights: The samples' weights.
        out: Arrays shaped and typed like value, locations and weights to write the gradients to.
        threads: As in :func:`forward`.
        points: As in :func:`forward`.

    Returns:
        Gradients of value, locations and weights.

    Raises:
        ValueError: Shapes that do not fit each other.
        TypeError: Types the kernel does not take, or arrays that are not on the CPU.
    """
    grad_out, value, locations, weights = _arrays(
        grad_out=grad_out, value=value, locations=locations, weights=weights
    )
    sizes = check_sizes(value, shapes, locations, weights, points)
    check_like("grad_out", grad_out, sizes.out, dtype_name(value))
    if out is None:
        out = (
            _empty(sizes.value, value),
            _empty(sizes.locations, locations),
            _empty(sizes.weights, weights),
        )
    targets = _targets(sizes, out, dtype_name(value), dtype_name(weights))
    native = _kernel()
    if native is None:
        inputs = [_as_numpy(array) for array in (grad_out, value, locations, weights)]
        for array, result in zip(out, fallback.backward(sizes, *inputs), strict=True):
            _as_numpy(array)[...] = result
        return out
    native.backward(
        _dense(grad_out),
        _dense(value),
        sizes.shapes,
        _dense(locations),
        _dense(weights),
        *targets,
        threads or default_threads() or usable_cores(),
        points=sizes.points if points is not None else (),
    )
    return out


def _targets(sizes: Sizes, out: tuple[Any, Any, Any], value: str, weights: str) -> list[Any]:
    return [
        _target("grad_value", out[0], sizes.value, value),
        _target("grad_locations", out[1], sizes.locations, weights),
        _target("grad_weights", out[2], sizes.weights, weights),
    ]
