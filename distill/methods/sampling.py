"""Cross-attention of either kind by memory cell: which cell gets how much.

A sampling point of deformable attention reads four cells bilinearly; its weight is split among
them. Everything is differentiable in weights and locations. A dense map per query and head does not
fit in memory at full size, so sums over queries are scattered directly, and two maps are compared
over the few hundred cells either of them touches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from detr.models import LevelShapes, SampledAttention
from detr.models.structures import Attention
from distill.methods.base import float32


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
        sampled: Locations ``[B, N, M, V, P, 2]`` and weights ``[B, N, M, V, P]``.
        shapes: (height, width) of the levels.

    Returns:
        Cells ``[B, N, M, V * P * 4]``.
    """
    locations, weights = float32(sampled.locations), float32(sampled.weights)
    sizes = torch.tensor([(w, h) for h, w in shapes], device=weights.device)
    counts = sizes.prod(-1)
    starts = (counts.cumsum(0) - counts)[:, None]
    width, height = sizes[:, None, 0], sizes[:, None, 1]
    place = locations * sizes[:, None] - 0.5
    low = place.detach().floor()
    part = place - low
    corner = low.long()
    # Weight and place of either neighbour along one axis; what lies outside weighs nothing.
    columns = [_neighbour(corner[..., 0], part[..., 0], width, d) for d in (0, 1)]
    rows = [_neighbour(corner[..., 1], part[..., 1], height, d) for d in (0, 1)]
    indices, values = [], []
    for y, down in rows:
        first, share = starts + y * width, weights * down
        for x, across in columns:
            indices.append((first + x).flatten(-2))
            values.append((share * across).flatten(-2))
    return Cells(torch.cat(indices, -1), torch.cat(values, -1), int(counts.sum()))


def _neighbour(low: Tensor, part: Tensor, size: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Cell and share of the lower (step 0) or upper (1) neighbour along one axis."""
    cell = low + step
    kept = cell.clamp(min=0).minimum(size - 1)
    return kept, (part if step else 1 - part) * (kept == cell)


def mean_heads(cells: Cells) -> Cells:
    """Mean over the heads: ``[B, N, M, C]`` to ``[B, N, M * C]``."""
    heads = cells.index.shape[-2]
    return Cells(cells.index.flatten(-2), cells.value.flatten(-2) / heads, cells.size)


def dense(cells: Cells) -> Tensor:
    """``[..., S]`` map; for small maps and pictures."""
    out = cells.value.new_zeros(*cells.index.shape[:-1], cells.size)
    return out.scatter_add(-1, cells.index, cells.value)


def spread(cells: Cells, weights: Tensor) -> Tensor:
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


def looked_at(attention: Attention, shapes: LevelShapes, weights: Tensor) -> Tensor:
    """Weighted sum of the queries' maps, averaged over heads, of attention of either kind.

    Args:
        attention: Of one decoder layer.
        shapes: (height, width) of the levels.
        weights: ``[B, N]``.

    Returns:
        ``[B, S]``.
    """
    if isinstance(attention, SampledAttention):
        return spread(attended_cells(attention, shapes), weights)
    return (
        torch.einsum("bn,bmns->bs", weights, float32(attention.weights))
        / (attention.weights.shape[1])
    )


def squared_distance(first: Cells, second: Cells) -> Tensor:
    """Sum of the squared differences of two maps of the same leading shape, a scalar.

    Equal to ``(dense(first) - dense(second)).square().sum()`` without the dense maps.
    """
    # Half the bytes to sort: cells are far fewer than 2^31.
    both = torch.cat((first.index, second.index), -1).to(torch.int32)
    index, order = both.sort(-1)
    values = torch.cat((first.value, -second.value), -1).gather(-1, order)
    # The entries of one cell now stand together; each cell's are added up in a place of its own.
    begins = torch.nn.functional.pad(index[..., 1:] != index[..., :-1], (1, 0))
    sums = torch.zeros_like(values).scatter_add(-1, begins.cumsum(-1), values)
    return sums.square().sum()
