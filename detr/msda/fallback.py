"""Deformable attention in numpy, for installations without the compiled kernel.

Slow (seconds where the kernel takes milliseconds) and not meant to be anything else; it is also
the float64 reference the tests hold the kernels to, being written without any of their code.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from detr.msda.check import Sizes

Array = np.ndarray[Any, np.dtype[Any]]


def _in_a_row(sizes: Sizes, samples: Array) -> Array:
    """Locations or weights with the samples of all levels on one axis, the fourth."""
    more = samples.shape[len(sizes.weights) :]
    return samples.reshape(*samples.shape[:3], sum(sizes.level_points), *more)


def _levels(sizes: Sizes) -> Iterator[slice]:
    """Where each level's samples lie in such a row."""
    start = 0
    for count in sizes.level_points:
        yield slice(start, start + count)
        start += count


def _corners(sizes: Sizes, locations: Array, level: int) -> Iterator[tuple[Array, ...]]:
    """Yields, per corner: token index, whether it is inside, x and y share, and their slopes.

    Each is ``[B, Q, M, P]`` where the level's locations are ``[B, Q, M, P, 2]``; the slopes (-1 or
    1) are d share / d position in cells.
    """
    height, width = sizes.shapes[level]
    start = sum(h * w for h, w in sizes.shapes[:level])
    with np.errstate(invalid="ignore"):
        x = locations[..., 0] * width - 0.5
        y = locations[..., 1] * height - 0.5
        near = (x >= -1) & (x < width) & (y >= -1) & (y < height)
    x, y = np.where(near, x, 0), np.where(near, y, 0)
    left, top = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
    for down in (0, 1):
        for right in (0, 1):
            column, line = left + right, top + down
            inside = near & (column >= 0) & (column < width) & (line >= 0) & (line < height)
            token = np.where(inside, start + line * width + column, 0)
            share_x = 1 - np.abs(x - column)
            share_y = 1 - np.abs(y - line)
            yield (
                token,
                inside,
                share_x,
                share_y,
                np.float64(2 * right - 1),
                np.float64(2 * down - 1),
            )


def _index(sizes: Sizes, token: Array) -> tuple[Array, Array, Array]:
    """Index of ``[B, Q, M, P]`` tokens into a ``[B, S, M, D]`` array."""
    batch = np.arange(sizes.batch)[:, None, None, None]
    head = np.arange(sizes.heads)[None, None, :, None]
    return batch, token, head


def forward(sizes: Sizes, value: Array, locations: Array, weights: Array) -> Array:
    """Returns ``[B, Q, M, D]`` in the precision of ``weights``."""
    values = value.astype(weights.dtype)
    out = np.zeros((sizes.batch, sizes.queries, sizes.heads, sizes.channels), weights.dtype)
    locations, weights = _in_a_row(sizes, locations), _in_a_row(sizes, weights)
    for level, own in enumerate(_levels(sizes)):
        corners = _corners(sizes, locations[:, :, :, own], level)
        for token, inside, share_x, share_y, _, _ in corners:
            share = np.where(inside, share_x * share_y * weights[:, :, :, own], 0)
            rows = np.where(inside[..., None], values[_index(sizes, token)], 0)
            out += np.einsum("bqmp,bqmpd->bqmd", share.astype(weights.dtype), rows)
    return out


def backward(
    sizes: Sizes, grad_out: Array, value: Array, locations: Array, weights: Array
) -> tuple[Array, Array, Array]:
    """Returns the gradients of value, locations and weights in the precision of ``weights``."""
    values = value.astype(weights.dtype)
    gradient = grad_out.astype(weights.dtype).reshape(
        sizes.batch, sizes.queries, sizes.heads, 1, sizes.channels
    )
    grad_value = np.zeros(sizes.value, weights.dtype)
    locations, weights = _in_a_row(sizes, locations), _in_a_row(sizes, weights)
    grad_locations, grad_weights = np.zeros_like(locations, weights.dtype), np.zeros_like(weights)
    for level, ((height, width), own) in enumerate(zip(sizes.shapes, _levels(sizes), strict=True)):
        weight, at = weights[:, :, :, own], locations[:, :, :, own]
        for token, inside, share_x, share_y, slope_x, slope_y in _corners(sizes, at, level):
            index = _index(sizes, token)
            rows = np.where(inside[..., None], values[index], 0)
            dot = (rows * gradient).sum(-1)
            share = np.where(inside, share_x * share_y, 0)
            np.add.at(grad_value, index, (share * weight)[..., None] * gradient)
            grad_weights[:, :, :, own] += share * dot
            grad_locations[:, :, :, own, 0] += weight * width * slope_x * share_y * dot
            grad_locations[:, :, :, own, 1] += weight * height * slope_y * share_x * dot
    return grad_value, grad_locations.reshape(sizes.locations), grad_weights.reshape(sizes.weights)
