"""Ground-truth masks over encoder tokens: where objects are, and how much each cell counts.

Used by CLoCKDistill (equations 3 and 4) and FGD.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from detr.models import Memory, Target, cxcywh_to_xyxy
from detr.models.geometry import constant
from distill.losses.targets import pad_targets

# Part of a cell a box may reach into the next one before that cell is its own: absorbs the
# rounding of `relative coordinate x number of cells`.
_SLACK = 1e-3


@torch.no_grad()
def scale_masks(targets: Sequence[Target], memory: Memory) -> tuple[Tensor, Tensor]:
    """Weights that make every object of a level count once, and its background once.

    Per level, box k covers the cells ``floor(x0)`` to ``ceil(x1)`` (both included, as in FGD's
    code) of the part of the map that the image covers, and each of its cells weighs one over
    their number; a cell in several boxes takes the smallest box's weight. Cells in no box weigh one
    over their number; cells in the padding weigh nothing.

    Args:
        targets: Ground truth per image.
        memory: Gives level shapes, valid ratios and padding.

    Returns:
        Foreground and background weights, ``[B, S]`` float32 each; where one is positive the other
        is zero.
    """
    boxes, _, counts = pad_targets(targets)
    corners = cxcywh_to_xyxy(boxes)
    present = torch.arange(boxes.shape[1]) < counts[:, None]
    present = present.to(boxes.device, non_blocking=True)
    foreground, background = [], []
    start = 0
    for level, (height, width) in enumerate(memory.shapes):
        valid = ~memory.padding[:, start : start + height * width]
        start += height * width
        cells = memory.valid_ratios[:, level] * constant([width, height], memory.valid_ratios)
        x, columns = _covered(corners[..., 0::2], cells[:, :1].round(), width)
        y, rows = _covered(corners[..., 1::2], cells[:, 1:].round(), height)
        share = present / (columns * rows).clamp(min=1)
        covered = (y[..., :, None] & x[..., None, :]) * share[..., None, None]
        weight = _largest(covered).flatten(1).to(torch.float32) * valid
        empty = valid & (weight == 0)
        foreground.append(weight)
        background.append(empty / empty.sum(1, keepdim=True).clamp(min=1))
    return torch.cat(foreground, 1), torch.cat(background, 1)


def _covered(ends: Tensor, cells: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Cells of one axis that boxes cover.

    Args:
        ends: ``[B, G, 2]`` lower and upper end in [0, 1] of the image.
        cells: ``[B, 1]`` cells the image covers.
        size: Cells of the map.

    Returns:
        ``[B, G, size]`` bool, and the number of covered cells ``[B, G]``.
    """
    last = (cells - 1).clamp(min=0)
    low = torch.floor(ends[..., 0] * cells + _SLACK).clamp(min=0).minimum(last)
    high = torch.ceil(ends[..., 1] * cells - _SLACK).clamp(min=0).minimum(last)
    high = torch.maximum(high, low)
    number = torch.arange(size, device=ends.device)
    inside = (number >= low[..., None]) & (number <= high[..., None])
    return inside, high - low + 1


def _largest(covered: Tensor) -> Tensor:
    """Maximum over the boxes of ``[B, G, H, W]``; zero where there is no box at all."""
    if covered.shape[1] == 0:
        return covered.new_zeros((covered.shape[0], *covered.shape[2:]))
    return covered.amax(1)
