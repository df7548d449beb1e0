"""Overlap of boxes on tensors: IoU, generalized IoU, share inside regions.

All boxes are x0 y0 x1 y1 (``detr.models.cxcywh_to_xyxy`` converts), in any one unit.
"""

from __future__ import annotations

import torch
from torch import Tensor


def area(boxes: Tensor) -> Tensor:
    """Area of ``[..., 4]`` xyxy boxes; 0 where a box is inside out."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)


def intersection(first: Tensor, second: Tensor) -> Tensor:
    """Common area of broadcastable ``[..., 4]`` xyxy boxes."""
    low = torch.maximum(first[..., :2], second[..., :2])
    high = torch.minimum(first[..., 2:], second[..., 2:])
    return (high - low).clamp(min=0).prod(-1)


def iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of broadcastable ``[..., 4]`` xyxy boxes; 0 for two empty boxes."""
    common = intersection(first, second)
    union = area(first) + area(second) - common
    return common / union.clamp(min=1e-9)


def giou(first: Tensor, second: Tensor) -> Tensor:
    """Generalised IoU in [-1, 1] of broadcastable ``[..., 4]`` xyxy boxes.

    Rezatofighi et al. 2019, equation 1: IoU minus the share of the enclosing box that neither box
    covers. Pairwise use: ``giou(a[:, None], b[None])``.
    """
    common = intersection(first, second)
    union = (area(first) + area(second) - common).clamp(min=1e-9)
    low = torch.minimum(first[..., :2], second[..., :2])
    high = torch.maximum(first[..., 2:], second[..., 2:])
    hull = (high - low).clamp(min=0).prod(-1).clamp(min=1e-9)
    return common / union - (hull - union) / hull


@torch.no_grad()
def pairwise_giou(first: Tensor, second: Tensor) -> Tensor:
    """:func:`giou` of every pair, without gradient and with few temporary tensors.

    Works on one plane per side and in place: ``giou(a[:, None], b[None])`` fetches every
    intermediate result from memory several times, which is what it spends its time on.

    Args:
        first: ``[..., N, 4]`` xyxy.
        second: ``[..., M, 4]`` xyxy, whose leading dimensions broadcast with the first's.

    Returns:
        ``[..., N, M]``.
    """
    ours = first.unsqueeze(-2).unbind(-1)
    # One plane per side, without gaps between its numbers, so that these are read as vectors.
    theirs = second.mT.contiguous().unsqueeze(-2).unbind(-3)
    common, hull, areas = [], [], []
    for low, high in ((0, 2), (1, 3)):
        side = torch.minimum(ours[high], theirs[high])
        side -= torch.maximum(ours[low], theirs[low])
        mine, other = ours[high] - ours[low], theirs[high] - theirs[low]
        # min(high) + max(high) is the sum of both, and so for low: the hull's side is what is left.
        hull.append((mine + other).sub_(side))
        common.append(side.clamp_(min=0))
        areas.append((mine.clamp(min=0), other.clamp(min=0)))
    overlap = common[0].mul_(common[1])
    union = areas[0][0] * areas[1][0] + areas[0][1] * areas[1][1]
    union = union.sub_(overlap).clamp_(min=1e-9)
    whole = hull[0].clamp_(min=0).mul_(hull[1].clamp_(min=0)).clamp_(min=1e-9)
    return overlap.div_(union).add_(union.div_(whole)).sub_(1)


def covered(boxes: Tensor, regions: Tensor) -> Tensor:
    """Share of each box that the region covering it best covers.

    Args:
        boxes: ``[..., N, 4]`` xyxy.
        regions: ``[R, 4]`` xyxy.

    Returns:
        ``[..., N]`` in [0, 1]; 0 everywhere when there is no region.
    """
    if len(regions) == 0:
        return boxes.new_zeros(boxes.shape[:-1])
    common = intersection(boxes[..., None, :], regions)
    return common.amax(-1) / area(boxes).clamp(min=1e-9)
