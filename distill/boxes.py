"""Overlap of boxes on tensors: IoU, generalised IoU, share inside regions.

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
