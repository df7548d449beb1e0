"""Cross-attention of either kind by memory cell: which cell gets how much.

A sampling point of deformable attention reads four cells bilinearly; its weight is split among
them. Everything is differentiable in weights and locations. A dense map per query and head does not
fit in memory at full size, so sums over queries are scattered directly, and two maps are compared
over the few hundred cells either of them touches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from detr.models import LevelShapes, SampledAttention
from detr.models.structures import Attention
from detr.points import level_points
from distill.methods.base import float32

# Entries of dense maps that exist at once: in a CPU's cache, or enough to fill a GPU.
_CACHED, _CHUNK = 2**19, 2**26


@dataclass
class Cells:
    """Attention over memory cells, sparse.

    Attributes:
        index: ``[..., C]`` int64 cell among all levels' cells, in [0, size).
        value: ``[..., C]`` float32; a cell that occurs repeatedly gets the sum.
        size: Number of cells S.
    """

    index: Tensor
    value: Tensor
    size: int


def attended_cells(sampled: SampledAttention, shapes: LevelShapes) -> Cells:
    """Splits every sample among the four cells around it (align_corners false).

    A sample at x in [0, 1] of the canvas lies at ``x * W - 0.5`` in cells; parts outside the map
    are dropped, as the attention reads zero there.

    Args:
        sampled: Of K samples.
        shapes: (height, width) of the levels.

    Returns:
        Cells ``[B, N, M, K * 4]``.
    """
    locations, weights = (float32(x) for x in sampled.in_a_row())
    # One number per sample rather than per level: a few elements at a time would cost most of it.
    points = torch.tensor(level_points(sampled.points, len(shapes)))
    sizes = torch.tensor(shapes)
    counts = sizes.prod(1)
    cells = int(counts.sum())
    starts = (counts.cumsum(0) - counts).repeat_interleave(points).to(torch.float32)
    sizes = sizes.repeat_interleave(points, 0).to(weights.device, non_blocking=True)
    starts = starts.to(weights.device, non_blocking=True)
    height, width = sizes.to(torch.float32).unbind(1)
    across, down = locations.unbind(-1)
    # Weight and place of either neighbor along one axis; what lies outside weighs nothing. Cells
    # are numbered in float32, which is exact up to 2^24 of them.
    columns, rows = _neighbors(across, width), _neighbors(down, height)
    index = torch.empty(
        (*weights.shape[:-1], 4, len(sizes)), dtype=torch.int64, device=sizes.device
    )
    values = []
    for i, (y, lower) in enumerate(rows):
        first, share = torch.addcmul(starts, y, width), weights * lower
        for j, (x, right) in enumerate(columns):
            index[..., 2 * i + j, :] = first + x
            values.append(share * right)
    return Cells(index.flatten(-2), torch.cat(values, -1), cells)


def _neighbors(place: Tensor, size: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Cell and share of the lower and the upper neighbor along one axis of ``[..., K]``."""
    place = place * size - 0.5
    low = place.detach().floor().nan_to_num_(0.0)  # a cell must exist; its share says nan
    part = place - low
    found = []
    for cell, share in ((low, 1 - part), (low + 1, part)):
        kept = cell.clamp(min=0).minimum(size - 1)
        found.append((kept, share * (kept == cell)))
    return found


def mean_heads(cells: Cells) -> Cells:
    """Mean over the heads: ``[B, N, M, C]`` to ``[B, N, M * C]``."""
    heads = cells.index.shape[-2]
    return Cells(cells.index.flatten(-2), cells.value.flatten(-2) / heads, cells.size)


def dense(cells: Cells) -> Tensor:
    """``[..., S]`` map; for small maps and pictures."""
    out = cells.value.new_zeros(*cells.index.shape[:-1], cells.size)
    return out.scatter_add(-1, cells.index, cells.value)


def weighted_map(cells: Cells, weights: Tensor) -> Tensor:
    """Weighted sum of the queries' maps, averaged over heads.

    Args:
        cells: ``[B, N, M, C]``.
        weights: ``[B, N]``.

    Returns:
        ``[B, S]``.
    """
    pooled = mean_heads(cells)
    values = pooled.value * weights[..., None]
    out = values.new_zeros(len(values), cells.size)
    return out.scatter_add(1, pooled.index.flatten(1), values.flatten(1))


def attended_map(attention: Attention, shapes: LevelShapes, weights: Tensor) -> Tensor:
    """Weighted sum of the queries' maps, averaged over heads, of attention of either kind.

    Args:
        attention: Of one decoder layer.
        shapes: (height, width) of the levels.
        weights: ``[B, N]``.

    Returns:
        ``[B, S]``.
    """
    if isinstance(attention, SampledAttention):
        return weighted_map(attended_cells(attention, shapes), weights)
    return (
        torch.einsum("bn,bmns->bs", weights, float32(attention.weights))
        / (attention.weights.shape[1])
    )


def squared_distance(first: Cells, second: Cells) -> Tensor:
    """Sum of the squared differences of two maps of the same leading shape, a scalar.

    Equal to ``(dense(first) - dense(second)).square().sum()``, with dense maps of only as many
    queries at a time as stay in a CPU's cache.
    """
    assert first.index.shape[:-1] == second.index.shape[:-1], "maps of other shapes"
    flat = (x.flatten(0, -2) for x in (first.value, second.value, first.index, second.index))
    distance: Tensor = _SquaredDistance.apply(*flat, first.size)
    return distance


class _SquaredDistance(torch.autograd.Function):
    """With d the difference of the maps, the gradient to an entry is twice d at its cell.

    So a look-up at the entries is all the gradient needs; the sum of d squared is that of value
    times d over all entries, and cells nobody looks at are never read.
    """

    @staticmethod
    def forward(
        ctx: Any, first: Tensor, second: Tensor, ours: Tensor, theirs: Tensor, size: int
    ) -> Tensor:
        block = _CACHED if first.device.type == "cpu" else _CHUNK
        together = max(1, min(len(first), block // max(1, size)))
        found = [torch.empty_like(first), torch.empty_like(second)]
        room, nothing = first.new_zeros(together, size), first.new_zeros(1, 1)
        for row in range(0, len(first), together):
            part = slice(row, row + together)
            difference = room[: len(first[part])]
            difference.scatter_add_(1, ours[part], first[part])
            difference.scatter_add_(1, theirs[part], -second[part])
            torch.gather(difference, 1, ours[part], out=found[0][part])
            torch.gather(difference, 1, theirs[part], out=found[1][part])
            for cells in (ours[part], theirs[part]):  # far fewer than the map has
                difference.scatter_(1, cells, nothing.expand_as(cells))
        ctx.save_for_backward(*found)
        total = first.flatten().dot(found[0].flatten()) - second.flatten().dot(found[1].flatten())
        return total.clamp(min=0)  # rounding may leave less than nothing

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        first, second = ctx.saved_tensors
        twice = 2 * gradients[0]
        wanted = ctx.needs_input_grad
        ours = twice * first if wanted[0] else None
        theirs = -twice * second if wanted[1] else None
        return ours, theirs, None, None, None
