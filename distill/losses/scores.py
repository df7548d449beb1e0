"""What class scores learn: losses per element of sigmoid scores, and of softmax ones per query."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.distributed import mean_over_processes
from distill.losses.costs import ALPHA, GAMMA

ScoreLoss = Literal["focal", "varifocal", "matchability", "iou_aware"]
# Weight of the background in the varifocal loss; RT-DETR's configs and its paper's code.
VARIFOCAL_ALPHA = 0.75
# DEIM's configs.
MATCHABILITY_GAMMA = 1.5
# LW-DETR's code: the share of the score in what a positive learns, and the least that it learns.
IOU_AWARE_ALPHA = 0.25
IOU_AWARE_LEAST = 0.01


def focal_loss(logits: Tensor, targets: Tensor, alpha: float = ALPHA) -> Tensor:
    """Sigmoid focal loss per element, gamma 2 (Lin et al. 2017, eq. 5), float32.

    Args:
        logits: Any shape.
        targets: Same shape, 0 or 1.
        alpha: Weight of the ones; zeros weigh ``1 - alpha``.
    """
    logits = logits.float()
    p = logits.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    wrong = p + targets - 2 * p * targets  # 1 - p_t
    balance = alpha * targets + (1 - alpha) * (1 - targets)
    return balance * wrong**GAMMA * cross_entropy


def varifocal_loss(logits: Tensor, goal: Tensor, positive: Tensor) -> Tensor:
    """Varifocal loss per element, alpha 0.75 and gamma 2, float32.

    Zhang et al. 2021, VarifocalNet, equation 2: positives weigh as much as their goal, which is the
    IoU of their box, the others by their own score. Weights carry no gradient, as in RT-DETR's
    code.

    Args:
        logits: Any shape.
        goal: Same shape, in [0, 1]; zero but for the positives.
        positive: Same shape, bool.
    """
    logits = logits.float()
    background = VARIFOCAL_ALPHA * logits.detach().sigmoid() ** GAMMA
    cross_entropy = F.binary_cross_entropy_with_logits(logits, goal, reduction="none")
    return torch.where(positive, goal, background) * cross_entropy


def matchability_loss(logits: Tensor, goal: Tensor, positive: Tensor) -> Tensor:
    """Matchability-aware loss per element, gamma 1.5, float32.

    Huang et al. 2025, DEIM, equation 3: positives all weigh the same and learn a power of the IoU,
    so that a box that fits badly still teaches; the others weigh by a power of their own score,
    without gradient. Arguments as :func:`varifocal_loss`.
    """
    logits = logits.float()
    background = logits.detach().sigmoid() ** MATCHABILITY_GAMMA
    cross_entropy = F.binary_cross_entropy_with_logits(
        logits, goal**MATCHABILITY_GAMMA, reduction="none"
    )
    return torch.where(positive, 1.0, background) * cross_entropy


def iou_aware_loss(logits: Tensor, goal: Tensor, positive: Tensor) -> Tensor:
    """IoU-aware cross-entropy per element, alpha 0.25 and gamma 2, float32.

    LW-DETR, equation 2 (after Cai et al. 2023, Align-DETR): positives learn a mean of their own
    score and the IoU, the others weigh by a power of their score, with its gradient. Arguments as
    :func:`varifocal_loss`.
    """
    logits = logits.float()
    score = logits.sigmoid()
    learned = score.detach() ** IOU_AWARE_ALPHA * goal ** (1 - IOU_AWARE_ALPHA)
    learned = torch.where(positive, learned.clamp(min=IOU_AWARE_LEAST), 0.0)
    background = torch.where(positive, 1 - learned, score**GAMMA)
    return -learned * F.logsigmoid(logits) - background * F.logsigmoid(-logits)


OVERLAP_LOSSES = {
    "varifocal": varifocal_loss,
    "matchability": matchability_loss,
    "iou_aware": iou_aware_loss,
}


def softmax_loss(
    logits: Tensor,
    place: tuple[Tensor, Tensor, Tensor],
    labels: Tensor,
    silent: Tensor,
    no_object: float,
) -> Tensor:
    """Cross-entropy with "no object" as the last class (DETR section 3.1), float32.

    Args:
        logits: ``[L, B, N, K + 1]``.
        place: Indices of the matched queries in ``[L, B, N]``.
        labels: Their classes.
        silent: ``[L, B, N]`` bool, queries without any loss.
        no_object: Weight of queries that should say "no object"; the others weigh 1.

    Returns:
        The weighted mean over each layer's queries of all processes, summed over layers.
    """
    wanted = torch.full(silent.shape, logits.shape[-1] - 1, device=logits.device)
    wanted[place] = labels
    weight = torch.full(silent.shape, no_object, device=logits.device)
    weight[place] = 1.0
    weight = weight.masked_fill(silent, 0.0)
    entropy = F.cross_entropy(logits.float().movedim(-1, 1), wanted, reduction="none")
    total = mean_over_processes(weight.sum((1, 2))).clamp(min=1e-6)
    return ((entropy * weight).sum((1, 2)) / total).sum()
