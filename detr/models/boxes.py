"""Box formats and the logit space in which boxes are refined."""

from __future__ import annotations

import torch
from torch import Tensor

LOGIT_EPS = 1e-5


def inverse_sigmoid(x: Tensor, eps: float = LOGIT_EPS) -> Tensor:
    """Logit of ``x`` in [0, 1], finite at both ends (Deformable DETR's clamp)."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """``[..., 4]`` center and size to corners."""
    center, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat((center - half, center + half), -1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """``[..., 4]`` corners to center and size."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat(((low + high) / 2, high - low), -1)


def lift(reference: Tensor, eps: float = LOGIT_EPS) -> Tensor:
    """Logits ``[..., 4]`` a box offset is added to: a bare center has zero size logits.

    Args:
        reference: ``[..., 2]`` or ``[..., 4]`` in [0, 1].
        eps: How near to 0 and 1 it may come.
    """
    logits = inverse_sigmoid(reference, eps)
    if reference.shape[-1] == 4:
        return logits
    return torch.cat((logits, torch.zeros_like(logits)), -1)
