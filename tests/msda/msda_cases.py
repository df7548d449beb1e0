"""Problems of deformable attention with their answers in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from detr.msda import fallback
from detr.msda.check import check_sizes
from detr.points import Points, sample_axes, unequal

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass
class Case:
    """One problem with float32 inputs; ``points`` of each level where they are unequal."""

    shapes: tuple[tuple[int, int], ...]
    value: Array
    locations: Array
    weights: Array
    grad_out: Array
    points: tuple[int, ...] | None = None

    def forward64(self) -> Array:
        inputs = [x.astype(np.float64) for x in (self.value, self.locations, self.weights)]
        sizes = check_sizes(inputs[0], self.shapes, inputs[1], inputs[2], self.points)
        return fallback.forward(sizes, *inputs).reshape(sizes.out)

    def backward64(self) -> tuple[Array, Array, Array]:
        inputs = [x.astype(np.float64) for x in (self.value, self.locations, self.weights)]
        sizes = check_sizes(inputs[0], self.shapes, inputs[1], inputs[2], self.points)
        return fallback.backward(sizes, self.grad_out.astype(np.float64), *inputs)


def make_case(
    shapes: tuple[tuple[int, int], ...],
    batch: int = 1,
    heads: int = 2,
    channels: int = 32,
    queries: int = 7,
    points: Points = 4,
    spread: float = 0.7,
    seed: int = 0,
) -> Case:
    """Random inputs; locations reach ``spread`` beyond the middle of the map on either side."""
    rng = np.random.default_rng(seed)
    tokens = sum(h * w for h, w in shapes)
    at = (batch, queries, heads, *sample_axes(points, len(shapes)))
    weights = rng.random(at, dtype=np.float32)
    weights /= weights.sum(tuple(range(3, len(at))), keepdims=True)
    return Case(
        shapes,
        rng.standard_normal((batch, tokens, heads, channels), dtype=np.float32),
        (0.5 + spread * (2 * rng.random((*at, 2), dtype=np.float32) - 1)).astype(np.float32),
        weights,
        rng.standard_normal((batch, queries, heads * channels), dtype=np.float32),
        unequal(points),
    )
