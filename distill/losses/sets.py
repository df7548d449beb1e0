"""The loss of one set of predictions whose assignment is known, whoever made them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from detr.models import Target, cxcywh_to_xyxy
from distill.losses.masks import MaskPredictions, mask_losses
from distill.losses.matches import Matches
from distill.losses.overlap import covered, giou
from distill.losses.scores import OVERLAP_LOSSES, ScoreLoss, focal_loss, softmax_loss
from distill.losses.targets import JoinedTargets, pair_iou
from distill.losses.union import BoxPairs
from distill.losses.weights import LossWeights

# A query this much inside an ignore region is not called background.
IGNORED_SHARE = 0.5


def box_losses(boxes: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Summed L1 and summed ``1 - GIoU`` of ``[M, 4]`` cx cy w h boxes, float32."""
    boxes = boxes.float()
    return (
        (boxes - targets).abs().sum(),
        (1 - giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(targets))).sum(),
    )


def ignored(boxes: Tensor, targets: Sequence[Target]) -> Tensor:
    """``[L, B, N]`` bool: which of the ``[L, B, N, 4]`` boxes lie in an ignore region."""
    share = [
        covered(cxcywh_to_xyxy(boxes[:, i].detach().float()), cxcywh_to_xyxy(target.ignore))
        for i, target in enumerate(targets)
    ]
    return torch.stack(share, 1) >= IGNORED_SHARE


def set_losses(
    logits: Tensor,
    boxes: Tensor,
    targets: Sequence[Target],
    matches: Matches,
    normalizer: Tensor,
    padding: Tensor | None = None,
    no_object: float | None = None,
    scores: ScoreLoss = "focal",
    boxed: BoxPairs | None = None,
    masks: MaskPredictions | None = None,
) -> dict[str, Tensor]:
    """Unweighted losses of ``[L, B, N]`` predictions whose assignment is known, summed over layers.

    Args:
        logits: ``[L, B, N, K]``.
        boxes: ``[L, B, N, 4]`` cx cy w h.
        targets: Ground truth per image.
        matches: The assigned pairs; every other query should predict no class.
        normalizer: Scalar every sum is divided by.
        padding: ``[B, N]`` bool, queries without any loss.
        no_object: Weight of the last logit, where it says "no object" (softmax); ``None`` for
            sigmoid scores. A layer's class loss is then a weighted mean over its queries (DETR).
        scores: What sigmoid scores learn, see :class:`LossWeights`.
        boxed: The pairs whose boxes learn, if these are others.
        masks: Of the same predictions, in a detector with masks.

    Returns:
        ``class``, ``l1`` and ``giou``, with masks ``mask`` and ``dice``, scalars.
    """
    truth = JoinedTargets.of(targets)
    _, labels = truth.of_pairs(matches)
    place = (matches.layer, matches.image, matches.query)

    silent = torch.zeros(logits.shape[:-1], dtype=torch.bool, device=logits.device)
    if any(len(target.ignore) for target in targets):
        silent = ignored(boxes, targets)
        silent[place] = False
    if padding is not None:
        silent = silent | padding
    if no_object is None:
        one_hot = torch.zeros_like(logits, dtype=torch.float32)
        positives = (*place, labels)
        one_hot[positives] = 1.0
        if scores == "focal":
            per_class = focal_loss(logits, one_hot)
        else:
            goal = torch.zeros_like(one_hot)
            goal[positives] = pair_iou(boxes, matches, truth)
            per_class = OVERLAP_LOSSES[scores](logits, goal, one_hot > 0)
        per_class = per_class.masked_fill(silent[..., None], 0.0)
        class_loss = per_class.sum() / normalizer
    else:
        class_loss = softmax_loss(logits, place, labels, silent, no_object)
    boxed = boxed or BoxPairs(matches, normalizer)
    parts = {"class": class_loss}
    parts |= matched_losses(boxes, targets, boxed.matches, boxed.normalizer)
    # A mask is learned by whom the object was given to, in its own layer.
    return parts if masks is None else parts | mask_losses(masks, targets, matches, normalizer)


def matched_losses(
    boxes: Tensor,
    targets: Sequence[Target],
    matches: Matches,
    normalizer: Tensor,
    masks: MaskPredictions | None = None,
) -> dict[str, Tensor]:
    """Box and mask losses of :func:`set_losses`, which only the matched queries have."""
    true_boxes, _ = JoinedTargets.of(targets).of_pairs(matches)
    l1, overlap = box_losses(boxes[matches.layer, matches.image, matches.query], true_boxes)
    parts = {"l1": l1 / normalizer, "giou": overlap / normalizer}
    return parts if masks is None else parts | mask_losses(masks, targets, matches, normalizer)


def weighted(
    name: str, parts: Mapping[str, Tensor], weights: LossWeights, factor: float = 1.0
) -> dict[str, Tensor]:
    """``name/class``, ``name/l1``, ``name/giou``, ...: a set's losses with the recipe's weights."""
    of_part = {"class": weights.focal, "l1": weights.l1, "giou": weights.giou}
    of_part |= {"mask": weights.mask, "dice": weights.dice}
    return {
        f"{name}/{part}": factor * weight * parts[part]
        for part, weight in of_part.items()
        if part in parts
    }
