"""OD-DETR's matching distillation: a query may answer to the teacher's match besides its own.

Two assignments of the same queries come in, the model's own and another's. Classification gives
every entry (query, class) of either assignment the query's IoU with its box as the target
(equations 2 and 3); regression lets queries that have no box of their own learn the other's,
the costlier of two queries at one box at a lower weight (equation 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from detr.models import Target, cxcywh_to_xyxy
from distill.losses.costs import GAMMA
from distill.losses.matches import Matches
from distill.losses.overlap import giou
from distill.losses.scores import focal_loss
from distill.losses.sets import ignored
from distill.losses.targets import JoinedTargets, pair_iou
from distill.methods.base import float32


@dataclass(frozen=True)
class Rules:
    """How two assignments become one loss; the defaults are the paper's.

    Attributes:
        classification: ``quality`` (equation 2) or ``focal`` with targets 0 and 1.
        least_iou: The other assignment's pairs count only above this IoU (StageInteractor's
            conditional matching, the rival of table 3 at 0.5).
        regression: The other assignment's pairs also regress.
        down_weight: w_d, of the costlier of two queries at one box.
        down_weight_classes: w_d also weighs the classification (table 4).
    """

    classification: Literal["quality", "focal"] = "quality"
    least_iou: float | None = None
    regression: bool = True
    down_weight: float = 0.51
    down_weight_classes: bool = False


def quality_focal_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Equation 2 per element: ``|t - s|^2 * BCE(s, t)``, float32; no gradient to the targets."""
    logits, targets = float32(logits), float32(targets).detach()
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return (targets - logits.sigmoid()).abs() ** GAMMA * entropy


def matching_losses(
    logits: Tensor,
    boxes: Tensor,
    targets: Sequence[Target],
    own: Matches,
    other: Matches | None,
    costs: Tensor,
    normalizer: Tensor,
    rules: Rules,
    padding: Tensor | None = None,
) -> dict[str, Tensor]:
    """Unweighted losses of predictions under two assignments, summed over layers.

    Args:
        logits: ``[L, B, N, K]``.
        boxes: ``[L, B, N, 4]`` cx cy w h.
        targets: Ground truth per image.
        own: The predictions' own assignment.
        other: Another assignment of the same queries, or ``None``.
        costs: ``[L, B, N, G]`` that decide which of two queries at a box is the costlier.
        normalizer: Scalar every sum is divided by.
        rules: See :class:`Rules`.
        padding: ``[B, N]`` bool, queries without any loss.

    Returns:
        ``class``, ``l1`` and ``giou``, scalars.
    """
    truth = JoinedTargets.of(targets)
    if other is not None and rules.least_iou is not None:
        other = other.where(pair_iou(boxes, other, truth) > rules.least_iou)
    own_weight, other_weight = _weights(own, other, costs, rules.down_weight)
    class_loss = _class_loss(logits, boxes, truth, own, other, (own_weight, other_weight), rules)
    if any(len(target.ignore) for target in targets):
        silent = ignored(boxes, targets)
        for matches in (own, other):
            if matches is not None:
                silent[matches.layer, matches.image, matches.query] = False
        class_loss = class_loss.masked_fill(silent[..., None], 0.0)
    if padding is not None:
        class_loss = class_loss.masked_fill(padding[None, ..., None], 0.0)
    l1, overlap = _regression(boxes, truth, own, own_weight)
    if other is not None and rules.regression:
        taken = torch.zeros(boxes.shape[:-1], dtype=torch.bool, device=boxes.device)
        taken[own.layer, own.image, own.query] = True
        free = (~taken[other.layer, other.image, other.query]).nonzero()[:, 0]
        further = _regression(boxes, truth, other.take(free), other_weight[free])
        l1, overlap = l1 + further[0], overlap + further[1]
    return {
        "class": class_loss.sum() / normalizer,
        "l1": l1 / normalizer,
        "giou": overlap / normalizer,
    }


def _class_loss(
    logits: Tensor,
    boxes: Tensor,
    truth: JoinedTargets,
    own: Matches,
    other: Matches | None,
    pair_weights: tuple[Tensor, Tensor],
    rules: Rules,
) -> Tensor:
    """``[L, B, N, K]``; where both assignments name the same entry, the own one decides."""
    goal = torch.zeros_like(logits, dtype=torch.float32)
    weight = torch.ones_like(goal)
    sides = zip((other, own), reversed(pair_weights), strict=True)
    for matches, down in sides:
        if matches is None:
            continue
        entry = (matches.layer, matches.image, matches.query, truth.of_pairs(matches)[1])
        quality = rules.classification == "quality"
        goal[entry] = pair_iou(boxes, matches, truth) if quality else 1.0
        if rules.down_weight_classes:
            weight[entry] = down
    loss = quality_focal_loss if rules.classification == "quality" else focal_loss
    return weight * loss(logits, goal)


@torch.no_grad()
def _weights(
    own: Matches, other: Matches | None, costs: Tensor, down_weight: float
) -> tuple[Tensor, Tensor]:
    """Weights of the pairs of both assignments: w_d for the costlier of two queries at a box.

    A query with a box of its own does not regress the other's, so that box keeps one query only.
    """
    own_weight = torch.ones(len(own.query), device=costs.device)
    if other is None or not len(own.query):
        return own_weight, own_weight.new_ones(0 if other is None else len(other.query))
    other_weight = torch.ones(len(other.query), device=costs.device)
    pair = torch.full((*costs.shape[:2], costs.shape[3]), -1, device=costs.device)
    pair[own.layer, own.image, own.box] = torch.arange(len(own.query), device=costs.device)
    has_own = torch.zeros(costs.shape[:3], dtype=torch.bool, device=costs.device)
    has_own[own.layer, own.image, own.query] = True
    rival = pair[other.layer, other.image, other.box]
    two = (rival >= 0) & ~has_own[other.layer, other.image, other.query]
    theirs = costs[other.layer, other.image, other.query, other.box]
    ours = costs[other.layer, other.image, own.query[rival], other.box]
    other_weight = other_weight.masked_fill(two & (theirs >= ours), down_weight)
    # Without asking how many they are: the rest writes to a place behind the last.
    place = rival.masked_fill(~(two & (theirs < ours)), len(own_weight))
    own_weight = F.pad(own_weight, (0, 1)).index_fill(0, place, down_weight)[:-1]
    return own_weight, other_weight


def _regression(
    boxes: Tensor, truth: JoinedTargets, matches: Matches, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Weighted sums of L1 and ``1 - GIoU`` over the pairs."""
    found = float32(boxes[matches.layer, matches.image, matches.query])
    goal = truth.of_pairs(matches)[0]
    overlap = giou(cxcywh_to_xyxy(found), cxcywh_to_xyxy(goal))
    return (
        (weights * (found - goal).abs().sum(-1)).sum(),
        (weights * (1 - overlap)).sum(),
    )
