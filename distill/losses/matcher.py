"""One-to-one assignment of queries to ground-truth boxes (DETR section 3.1, focal-cost variant).

Costs of all layers and images are computed in one batch of tensor operations and moved to the CPU
once; only the assignment itself runs per image and layer (:mod:`distill.losses.linear_assignment`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from detr.models import Target, cxcywh_to_xyxy
from distill.losses.linear_assignment import assign
from distill.losses.overlap import pairwise_giou
from distill.profiler import timed

ALPHA, GAMMA = 0.25, 2.0
# A cost no real pair reaches: a prediction that is not a number is assigned last, never first.
_NEVER = 1e6


@dataclass
class Matches:
    """Assigned pairs over all layers and images, M of them, as index tensors ``[M]``.

    Attributes:
        layer, image, query: Where the prediction stands in ``[L, B, N]``.
        box: Index of the ground-truth box within its image.
    """

    layer: Tensor
    image: Tensor
    query: Tensor
    box: Tensor

    def where(self, kept: Tensor) -> Matches:
        """The pairs for which ``kept [M]`` is true."""
        return Matches(self.layer[kept], self.image[kept], self.query[kept], self.box[kept])

    def at(self, layer: int, to: int | None = None) -> Matches:
        """The pairs of one layer, as layer ``to`` if that is given."""
        found = self.where(self.layer == layer)
        if to is not None:
            found.layer = torch.full_like(found.layer, to)
        return found


def join_matches(parts: Sequence[Matches]) -> Matches:
    """All pairs of several (at least one) sets of matches."""
    return Matches(
        torch.cat([p.layer for p in parts]),
        torch.cat([p.image for p in parts]),
        torch.cat([p.query for p in parts]),
        torch.cat([p.box for p in parts]),
    )


def pad_targets(targets: Sequence[Target]) -> tuple[Tensor, Tensor, Tensor]:
    """Stacks ground truth of different lengths.

    Returns:
        ``[B, G, 4]`` boxes and ``[B, G]`` labels, filled up with zeros to the longest image, and
        the ``[B]`` counts (CPU).
    """
    counts = torch.tensor([len(target.labels) for target in targets])
    boxes = torch.nn.utils.rnn.pad_sequence([t.boxes for t in targets], batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence([t.labels for t in targets], batch_first=True)
    return boxes, labels, counts


@timed("matching")
@torch.no_grad()
def cost_matrix(
    logits: Tensor,
    boxes: Tensor,
    targets: Sequence[Target],
    weights: tuple[float, float, float],
    no_object: bool = False,
) -> Tensor:
    """Matching cost of every prediction with every (padded) ground-truth box of its image.

    Args:
        logits: ``[L, B, N, K]``.
        boxes: ``[L, B, N, 4]`` cx cy w h.
        targets: Ground truth per image.
        weights: Of the class, L1 and GIoU costs.
        no_object: The last logit says "no object": the class cost is then the negative softmax
            probability (DETR, equation 1).

    Returns:
        ``[L, B, N, G]`` float32, finite; columns beyond an image's count are meaningless.
    """
    scores, l1, overlap = pair_scores(logits, boxes, targets, no_object)
    return total_cost(scores, l1, overlap, weights, no_object)


@torch.no_grad()
def pair_scores(
    logits: Tensor, boxes: Tensor, targets: Sequence[Target], no_object: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """What the cost of a pair is made of, ``[L, B, N, G]`` each, float32.

    Returns:
        Score of the box's class, L1 distance and generalised IoU.
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
    return scores.mT, l1.mT, overlap.mT


def total_cost(
    p: Tensor,
    l1: Tensor,
    overlap: Tensor,
    weights: tuple[float, float, float],
    no_object: bool = False,
) -> Tensor:
    """Weighted class cost (see :func:`cost_matrix`), L1 and negative generalised IoU; finite."""
    class_weight, l1_weight, giou_weight = weights
    if no_object:
        class_cost = -p
    else:
        positive = ALPHA * (1 - p) ** GAMMA * -(p + 1e-8).log()
        negative = (1 - ALPHA) * p**GAMMA * -(1 - p + 1e-8).log()
        class_cost = positive - negative
    cost = class_weight * class_cost + l1_weight * l1 - giou_weight * overlap
    return cost.nan_to_num(_NEVER, _NEVER, -_NEVER)


@timed("matching")
@torch.no_grad()
def match(
    logits: Tensor,
    boxes: Tensor,
    targets: Sequence[Target],
    weights: tuple[float, float, float] = (2.0, 5.0, 2.0),
    padding: Tensor | None = None,
    no_object: bool = False,
) -> Matches:
    """Assigns each ground-truth box the prediction that minimises the total cost, layer by layer.

    An image with more boxes than queries leaves the worst-fitting boxes without a query.

    Args:
        logits: ``[L, B, N, K]``.
        boxes: ``[L, B, N, 4]`` cx cy w h.
        targets: Ground truth per image.
        weights: Of the class, L1 and GIoU costs.
        padding: ``[B, N]`` bool, queries that only take what no other query is left for.
        no_object: See :func:`cost_matrix`.

    Returns:
        The assigned pairs on the predictions' device.
    """
    costs = cost_matrix(logits, boxes, targets, weights, no_object)
    if padding is not None:
        costs = costs.masked_fill(padding[None, ..., None], _NEVER)
    return match_costs(costs, targets)


@timed("matching")
def match_costs(costs: Tensor, targets: Sequence[Target]) -> Matches:
    """:func:`match` for costs that are known.

    Args:
        costs: ``[L, B, N, G]`` of every prediction with every (padded) box of its image.
        targets: Ground truth per image.
    """
    layers, images, queries, boxes = costs.shape
    counts = torch.tensor([len(target.labels) for target in targets]).repeat(layers)
    rows = torch.full_like(counts, queries)
    place, query, box = assign(costs.reshape(layers * images, queries, boxes), rows, counts)
    layer = torch.div(place, images, rounding_mode="floor")
    return Matches(layer, place - layer * images, query, box)
