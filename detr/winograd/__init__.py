"""3x3 convolutions of stride 1 on a CPU with AVX2, without torch, by Winograd's algorithm.

Source: Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv 1509.09308: a tile
of 2x2 outputs needs 16 products of channels instead of 36.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from detr.cores import default_threads, usable_cores

__all__ = ["Convolution", "available", "takes"]

Array = npt.NDArray[Any]
Activation = Literal["none", "relu", "silu"]
_ACTIVATIONS: tuple[Activation, ...] = ("none", "relu", "silu")  # as kernel.hpp counts them
_INPUTS, _OUTPUTS, _PLACES = 8, 16, 16


@cache
def _kernel() -> ModuleType | None:
    """The compiled module, where it was built."""
    try:
        return import_module("detr.winograd._native")
    except ImportError:
        return None


def available() -> bool:
    """Whether the kernel was built and this processor has AVX2."""
    native = _kernel()
    return native is not None and bool(native.supported())


def takes(shape: tuple[int, ...]) -> bool:
    """Whether the kernel computes with weights ``[N, C, 3, 3]`` of this shape."""
    return (
        len(shape) == 4
        and shape[2:] == (3, 3)
        and shape[0] % _OUTPUTS == 0
        and shape[1] % _INPUTS == 0
    )


class Convolution:
    """A convolution of stride 1 with a border of zeros: maps keep their size.

    Args:
        weights: ``[N, C, 3, 3]`` float32; N a multiple of 16, C of 8.
        bias: ``[N]`` float32; zero by default.
        activation: Of the result.

    Raises:
        ValueError: Weights of another shape.
    """

    def __init__(
        self, weights: Array, bias: Array | None = None, activation: Activation = "none"
    ) -> None:
        if not takes(weights.shape):
            raise ValueError(f"no kernel for weights of shape {weights.shape}")
        native = _kernel()
        assert native is not None
        self._native = native
        self.outputs, self.inputs = weights.shape[:2]
        self._activation = _ACTIVATIONS.index(activation)
        self._bias = np.zeros(self.outputs, np.float32)
        if bias is not None:
            self._bias[:] = bias
        self._packed = np.empty(_PLACES * self.outputs * self.inputs, np.float32)
        native.pack(np.ascontiguousarray(weights, np.float32), self._packed)

    def __call__(
        self,
        maps: Array,
        out: Array | None = None,
        threads: int | None = None,
        added: Array | None = None,
    ) -> Array:
        """``[B, H, W, C]`` float32 to ``[B, H, W, N]``; channels come last.

        Args:
            maps: Dense.
            out: Where to write; a new array by default.
            threads: By default ``OMP_NUM_THREADS``, or all cores this process may use. The result
                has the same bits with any number.
            added: ``[B, H, W, N]``, added to the result before the activation.
        """
        if out is None:
            out = np.empty((*maps.shape[:3], self.outputs), np.float32)
        threads = threads or default_threads() or usable_cores()
        self._native.forward(maps, self._packed, self._bias, out, threads, added, self._activation)
        return out
