"""Non-maximum suppression: in numpy, after the graph, so that every engine does the same."""

from __future__ import annotations

import numpy as np

from detr.types import Detections, FloatArray


def suppress(found: Detections, threshold: float) -> Detections:
    """Drops boxes that overlap a better one of their class.

    Args:
        found: Best first.
        threshold: Greatest IoU with a better detection that is kept (Stable-DINO: 0.8).
    """
    overlaps = _iou(found.boxes.astype(np.float64)) > threshold
    overlaps &= found.labels[:, None] == found.labels
    kept = np.ones(len(found), dtype=bool)
    for i in range(len(found)):
        if kept[i]:
            kept[i + 1 :] &= ~overlaps[i, i + 1 :]
    return found.take(np.flatnonzero(kept))


def _iou(boxes: FloatArray) -> FloatArray:
    """``[N, N]`` of boxes ``[N, 4]`` x0 y0 x1 y1."""
    low = np.maximum(boxes[:, None, :2], boxes[:, :2])
    high = np.minimum(boxes[:, None, 2:], boxes[:, 2:])
    common = (high - low).clip(min=0).prod(-1)
    areas = (boxes[:, 2:] - boxes[:, :2]).clip(min=0).prod(-1)
    union = areas[:, None] + areas - common
    shares: FloatArray = common / np.maximum(union, np.finfo(np.float64).tiny)
    return shares
