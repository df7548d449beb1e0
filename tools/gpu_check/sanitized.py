"""Both kernels on arrays of exactly their size, for compute-sanitizer to watch.

    compute-sanitizer python -m tools.gpu_check.sanitized KIND

Answers are compared with float64 as well: a sanitizer that watched nothing would find nothing.
"""

from __future__ import annotations

import sys
from typing import Any

import ml_dtypes
import numpy as np

from detr.msda import cuda_kernels, fallback
from detr.msda.check import check_sizes
from detr.msda.cuda_source import Attention
from tools.gpu_check.driver import Driver

SHAPES = ((7, 9), (3, 4), (1, 1), (5, 2))
BATCH, QUERIES, HEADS, POINTS = 2, 5, 3, 2
# Type, channels and whether the levels are fixed when compiled: what makes the code differ.
KINDS = {
    "float32-32-fixed": ("float32", 32, True),
    "float16-7": ("float16", 7, False),  # lanes without channels, one value at a time
    "bfloat16-256": ("bfloat16", 256, False),  # a head as wide as a warp
    "float64-1": ("float64", 1, False),  # a head of one thread
}
_ALLOWED = {"float32": 4e-6, "float16": 1e-3, "bfloat16": 8e-3, "float64": 1e-13}


def attention(kind: str) -> Attention:
    """What the kernels of a kind are compiled for."""
    dtype, channels, fixed = KINDS[kind]
    return Attention(dtype, HEADS, channels, len(SHAPES), POINTS, SHAPES if fixed else None)


def run(kind: str) -> dict[str, float]:
    """Errors of output and gradients, relative to the largest of each."""
    compiled, driver = attention(kind), Driver()
    dtype, channels = compiled.dtype, compiled.channels
    stored: Any = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    coordinates: Any = np.float64 if dtype == "float64" else np.float32
    rng = np.random.default_rng(0)
    tokens = sum(height * width for height, width in SHAPES)
    at = (BATCH, QUERIES, HEADS, len(SHAPES), POINTS)
    locations = (rng.random((*at, 2)) * 1.6 - 0.3).astype(coordinates)
    locations[0, 0, 0, 0, 0] = np.nan, 1e30
    locations[1, 4, 2, 3, 1] = -np.inf, np.inf
    locations[0, 1, 1] = 1.0  # the last corner of every level, at the end of the array
    value = rng.standard_normal((BATCH, tokens, HEADS, channels)).astype(stored)
    weights = rng.random(at).astype(coordinates)
    grad_out = rng.standard_normal((BATCH, QUERIES, HEADS * channels)).astype(stored)

    shapes = None if compiled.shapes else SHAPES
    inputs = [driver.upload(array) for array in (value, locations, weights)]
    like = [grad_out, value.astype(coordinates), locations, weights]
    rooms = [driver.room(array, zeros=index == 1) for index, array in enumerate(like)]
    launch = (compiled, 0, driver.stream, (BATCH, QUERIES))
    cuda_kernels.forward(*launch, inputs, rooms[0], shapes)
    cuda_kernels.backward(*launch, [driver.upload(grad_out), *inputs], rooms[1:], shapes)
    found = [driver.download(*pair).astype(np.float64) for pair in zip(rooms, like, strict=True)]

    wide = [array.astype(np.float64) for array in (value, locations, weights)]
    sizes = check_sizes(wide[0], SHAPES, wide[1], wide[2])
    exact = [fallback.forward(sizes, *wide).reshape(sizes.out)]
    exact += fallback.backward(sizes, grad_out.astype(np.float64), *wide)
    names = ("out", "value", "locations", "weights")
    errors = {
        name: float(np.abs(one - other).max() / np.abs(other).max())
        for name, one, other in zip(names, found, exact, strict=True)
    }
    if not all(error <= _ALLOWED[dtype] for error in errors.values()):
        raise RuntimeError(f"{errors}, at most {_ALLOWED[dtype]} is allowed")
    return errors


if __name__ == "__main__":
    print(run(sys.argv[1]))
