"""Where tokens lie and what they cover: padding, valid ratios, centers and sampling frames.

An image sits at the top left of a padded canvas. References and boxes are relative to the image
*without* its padding; attention samples the padded map. ``valid_ratios`` takes one to the other.
Everything is plain tensor arithmetic on static shapes, so it exports with a dynamic batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from detr.models.structures import LevelShapes
from detr.points import Points


class SamplingFrame(NamedTuple):
    """Turns the offsets a query predicts into sampling locations: ``center + offset * unit``.

    Attributes:
        center: ``[B, N, V, P, 2]`` (x, y) of the reference on each level, in [0, 1] of the canvas;
            repeated over the points and contiguous, so that the sum over heads runs vectorized.
            ``[B, N, K, 2]`` where the levels' numbers of points differ.
        unit: Shaped like ``center`` (or 1s for B and N), length of one offset step, same
            coordinates.
        ratios: ``[B, V, 2]`` valid ratios (width, height).
    """

    center: Tensor
    unit: Tensor
    ratios: Tensor


def valid_ratios(valid_sizes: Tensor, shapes: LevelShapes, canvas: tuple[int, int]) -> Tensor:
    """Share of each level's cells that the image covers, ``[B, V, 2]`` as (width, height).

    A cell belongs to the image if its first pixel does: ``x * canvas / cells < valid width``. That
    is what the original codes get by resizing the pixel mask to the level with nearest-neighbor
    sampling, also on a canvas that is no multiple of the stride.

    Args:
        valid_sizes: ``[B, 2]`` (height, width) of the image inside the canvas, pixels.
        shapes: (height, width) of the levels.
        canvas: (height, width), pixels.
    """
    sizes = valid_sizes.flip(-1)[:, None]
    extent = _extents(shapes, sizes)
    # Multiplied first: the product is exact, so the quotient rounds to a whole number of cells
    # exactly where it is one.
    cells = torch.ceil(sizes * extent / constant((canvas[1], canvas[0]), sizes))
    return torch.minimum(cells, extent) / extent


def padding_mask(ratios: Tensor, shapes: LevelShapes) -> Tensor:
    """``[B, S]`` bool, true for tokens outside the image; see :func:`valid_ratios`."""
    masks = []
    for level, (height, width) in enumerate(shapes):
        # Half a cell of slack: ratio x size need not round back to the whole number of cells.
        x = torch.arange(width, device=ratios.device, dtype=ratios.dtype) + 0.5
        y = torch.arange(height, device=ratios.device, dtype=ratios.dtype) + 0.5
        outside_x = x[None] > ratios[:, level, 0, None] * width
        outside_y = y[None] > ratios[:, level, 1, None] * height
        masks.append((outside_y[:, :, None] | outside_x[:, None, :]).flatten(1))
    return torch.cat(masks, 1)


def token_centers(ratios: Tensor, shapes: LevelShapes) -> Tensor:
    """``[B, S, 2]`` (x, y) cell centers relative to the image without padding (may exceed 1)."""
    centers = []
    for level, (height, width) in enumerate(shapes):
        x = torch.arange(width, device=ratios.device, dtype=ratios.dtype) + 0.5
        y = torch.arange(height, device=ratios.device, dtype=ratios.dtype) + 0.5
        x = x[None] / (ratios[:, level, 0, None] * width)
        y = y[None] / (ratios[:, level, 1, None] * height)
        grid = (x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width))
        centers.append(torch.stack(grid, -1).flatten(1, 2))
    return torch.cat(centers, 1)


def sampling_frame(
    reference: Tensor, ratios: Tensor, shapes: LevelShapes, points: Points
) -> SamplingFrame:
    """Frame of a reference (Deformable DETR, section 4.1 and appendix A.4).

    A 2-d reference counts offsets in cells of each level; a 4-d one counts them in parts of the
    box: ``offset / P * (w, h) / 2``.

    Args:
        reference: ``[B, N, 2]`` or ``[B, N, 4]`` relative to the image without padding.
        ratios: ``[B, V, 2]`` valid ratios.
        shapes: (height, width) of the levels.
        points: Sampling points P per level, or of each level.
    """
    share = ratios[:, None]
    center = reference[:, :, None, :2] * share
    if reference.shape[-1] == 2:
        unit = 1 / _extents(shapes, center)[None]
    else:
        unit = reference[:, :, None, 2:] * share * _half_a_point(points, share)
    if not isinstance(points, int):
        return SamplingFrame(per_sample(center, points), per_sample(unit, points), ratios)
    repeat = (1, 1, 1, points, 1)
    return SamplingFrame(
        center[:, :, :, None].repeat(repeat), unit[:, :, :, None].repeat(repeat), ratios
    )


def _half_a_point(points: Points, like: Tensor) -> float | Tensor:
    """1 / 2P, where the levels differ ``[V, 1]``."""
    if isinstance(points, int):
        return 0.5 / points
    return constant([[0.5 / count] for count in points], like)


def per_sample(levels: Tensor, points: Sequence[int]) -> Tensor:
    """``[..., V, C]`` per level to ``[..., K, C]`` per sample, for unequal numbers of points.

    Slices and no index: a traced graph then has neither a Gather nor its table.
    """
    parts = torch.split(levels, 1, -2)
    repeated = [p.expand(*p.shape[:-2], n, -1) for p, n in zip(parts, points, strict=True)]
    return torch.cat(repeated, -2)


def join_frames(frames: list[SamplingFrame]) -> SamplingFrame:
    """Concatenates frames of several query groups along N; the kinds of reference may differ."""
    if len(frames) == 1:
        return frames[0]
    center = torch.cat([frame.center for frame in frames], 1)
    if all(frame.unit.shape[1] == 1 for frame in frames):
        return frames[0]._replace(center=center)
    unit = torch.cat([frame.unit.expand_as(frame.center) for frame in frames], 1)
    return frames[0]._replace(center=center, unit=unit)


def whole_cells(locations: Tensor, ratios: Tensor, shapes: LevelShapes, points: Points) -> Tensor:
    """Sampling locations moved to the centers of cells within the image (RT-DETRv2).

    The cell is number ``floor(x * width + 1/2)``, as in its code, which trained weights know, and
    at most the last one that the image covers. There bilinear sampling reads that cell alone, so
    every attention operator samples discretely without knowing of it.

    Args:
        locations: ``[B, N, M, V, P, 2]``, or ``[B, N, M, K, 2]`` where the levels' numbers of
            points differ, (x, y) in [0, 1] of the canvas.
        ratios: ``[B, V, 2]`` valid ratios.
        shapes: (height, width) of the levels.
        points: Sampling points P per level, or of each level.
    """
    extent = _extents(shapes, locations)  # [1, V, 2]
    last = (ratios * extent - 0.5).floor()
    if isinstance(points, int):
        last, extent = (x[:, None, None, :, None] for x in (last, extent))
    else:
        last, extent = (per_sample(x, points)[:, None, None] for x in (last, extent))
    cell = (locations * extent + 0.5).floor().clamp(min=0)
    return (torch.minimum(cell, last) + 0.5) / extent


def _extents(shapes: LevelShapes, like: Tensor) -> Tensor:
    """``[1, V, 2]`` (width, height) of each level in cells."""
    return constant([[width, height] for height, width in shapes], like)[None]


def constant(values: Sequence[Any], like: Tensor) -> Tensor:
    """Numbers as a tensor of another's type on its device, which is not waited for."""
    made = torch.tensor(values, dtype=like.dtype)
    return made if like.device.type == "cpu" else made.to(like.device, non_blocking=True)
