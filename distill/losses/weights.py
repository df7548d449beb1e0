"""How much each part of the detection loss weighs: what a recipe says under ``loss``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from detr.config import Strict, Weight
from distill.losses.costs import MatchingCosts
from distill.losses.scores import ScoreLoss


class LossWeights(Strict):
    """Weights of the detection loss.

    Attributes:
        focal: Of the class loss (1 for DINO, DETR and RT-DETR, 2 for Deformable DETR).
        scores: What sigmoid scores learn: ``focal`` loss towards 1 for a matched query,
            ``varifocal`` towards the IoU of its box (RT-DETR), ``matchability`` towards a power of
            it (DEIM), or ``iou_aware`` towards a mean of it and the score itself (LW-DETR).
        l1, giou: Of the box losses.
        edges: Of the loss of edges' distributions (D-FINE's FGL, 0.15), where boxes are read off
            such.
        box_pairs: Which pairs teach boxes: each layer's ``own`` matches, or for all layers alike
            the ``union`` of all layers' and the proposals' (D-FINE's GO-LSD).
        mask, dice: Of the mask losses, cross-entropy and dice, in a detector with masks.
        cost_class, cost_l1, cost_giou, cost_mask, cost_dice: Of the matching cost.
        mask_points: Points of a mask that both look at (Mask2Former: 112 x 112).
        proposals: Factor on the same losses of the encoder's proposals.
        denoising: Factor on the same losses of the denoising queries.
        one_to_many: Factor on the same losses of the one-to-many queries (H-DETR).
        no_object: Weight of "no object" in a softmax class loss (DETR).
    """

    focal: Weight = 1.0
    scores: ScoreLoss = "focal"
    l1: Weight = 5.0
    giou: Weight = 2.0
    edges: Weight = 0.0
    box_pairs: Literal["own", "union"] = "own"
    mask: Weight = 5.0
    dice: Weight = 5.0
    cost_class: Weight = 2.0
    cost_l1: Weight = 5.0
    cost_giou: Weight = 2.0
    cost_mask: Weight = 5.0
    cost_dice: Weight = 5.0
    mask_points: Annotated[int, Field(ge=4, le=1_000_000)] = 12544
    proposals: Weight = 1.0
    denoising: Weight = 1.0
    one_to_many: Weight = 1.0
    no_object: Weight = 0.1

    @property
    def of_masks(self) -> tuple[str, ...]:
        """Names of the weights that only a detector with masks has a use for, if not the defaults.

        A run's recipe has every default written out, so being named is not being meant.
        """
        names = ("mask", "dice", "cost_mask", "cost_dice", "mask_points")
        defaults = type(self).model_fields
        return tuple(name for name in names if getattr(self, name) != defaults[name].default)

    @property
    def costs(self) -> MatchingCosts:
        """Weights of the matching cost."""
        boxes = self.cost_class, self.cost_l1, self.cost_giou
        return MatchingCosts(*boxes, self.cost_mask, self.cost_dice)
