"""What it costs to let a prediction stand for a ground-truth box (DETR section 3.1).

The class cost is the focal one of Deformable DETR, or DETR's own for softmax scores. Where there
are masks, theirs is added (Mask DINO, section 3.4). Costs of all layers and images are computed in
one batch of tensor operations, those of masks image by image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from detr.models import Target, cxcywh_to_xyxy
from distill.losses.masks import MaskPredictions, mask_terms
from distill.losses.overlap import pairwise_giou
from distill.losses.targets import pad_targets
from distill.profiler import timed

ALPHA, GAMMA = 0.25, 2.0
# A cost no real pair reaches: a prediction that is not a number is assigned last, never first.
NEVER = 1e6


@dataclass(frozen=True)
class PairTerms:
    """What the cost of a pair is made of, ``[L, B, N, G]`` each, float32.

    Columns beyond an image's count of boxes are meaningless.

    Attributes:
        score: Of the box's class.
        l1: Distance of the boxes, summed over coordinates.
        giou: Their generalized IoU.
        mask: Cross-entropy of the masks, where there are masks.
        dice: Their ``1 - dice``.
    """

    score: Tensor
    l1: Tensor
    giou: Tensor
    mask: Tensor | None = None
    dice: Tensor | None = None


@torch.no_grad()
def pair_terms(
    logits: Tensor,
    boxes: Tensor,
    targets: Sequence[Target],
    no_object: bool = False,
    masks: MaskPredictions | None = None,
) -> PairTerms:
    """The terms of every prediction with every (padded) ground-truth box of its image.

    Args:
        logits: ``[L, B, N, K]``.
        boxes: ``[L, B, N, 4]`` cx cy w h.
        targets: Ground truth per image.
        no_object: The last logit says "no object", so scores are those of a softmax.
        masks: Of the same predictions, in a detector with masks.
    """
    true_boxes, true_labels, _ = pad_targets(targets)
    layers, _, queries, _ = logits.shape
    index = true_labels[None, :, :, None].expand(layers, -1, -1, queries)
    # Only the columns of classes that occur are wanted, so gather before the logarithms.
    if no_object:
        scores = logits.float().softmax(-1).transpose(-1, -2).gather(-2, index)
    else:
        scores = logits.float().transpose(-1, -2).gather(-2, index).sigmoid()
    # Queries along the rows of memory: an image's few boxes there make every operation slow.
    boxes, true_boxes = boxes.float(), true_boxes.expand(layers, -1, -1, -1)
    l1 = torch.cdist(true_boxes, boxes, p=1)
    overlap = pairwise_giou(cxcywh_to_xyxy(true_boxes), cxcywh_to_xyxy(boxes))
    of_masks = (None, None) if masks is None else mask_terms(masks, targets)
    return PairTerms(scores.mT, l1.mT, overlap.mT, *of_masks)


@dataclass(frozen=True)
class MatchingCosts:
    """Weights of the matching cost.

    Attributes:
        classes: Of the class cost.
        l1: Of the boxes' L1 distance.
        giou: Of their negative generalized IoU.
        mask: Of the masks' cross-entropy.
        dice: Of their ``1 - dice``.
    """

    classes: float = 2.0
    l1: float = 5.0
    giou: float = 2.0
    mask: float = 5.0
    dice: float = 5.0

    def of_terms(self, terms: PairTerms, no_object: bool = False) -> Tensor:
        """Cost ``[L, B, N, G]`` of pairs, finite.

        Args:
            terms: Of the pairs.
            no_object: The class cost is the negative probability (DETR, equation 1), not the focal
                one.
        """
        p = terms.score
        if no_object:
            class_cost = -p
        else:
            positive = ALPHA * (1 - p) ** GAMMA * -(p + 1e-8).log()
            negative = (1 - ALPHA) * p**GAMMA * -(1 - p + 1e-8).log()
            class_cost = positive - negative
        cost = self.classes * class_cost + self.l1 * terms.l1 - self.giou * terms.giou
        if terms.mask is not None and terms.dice is not None:
            cost = cost + self.mask * terms.mask + self.dice * terms.dice
        return cost.nan_to_num(NEVER, NEVER, -NEVER)

    @timed("matching")
    @torch.no_grad()
    def matrix(
        self,
        logits: Tensor,
        boxes: Tensor,
        targets: Sequence[Target],
        no_object: bool = False,
        masks: MaskPredictions | None = None,
    ) -> Tensor:
        """Cost ``[L, B, N, G]`` of every prediction with every box, see :func:`pair_terms`."""
        return self.of_terms(pair_terms(logits, boxes, targets, no_object, masks), no_object)
