"""One-to-one assignment of queries to ground-truth boxes (DETR section 3.1).

Costs are moved to the CPU once; only the assignment itself runs per image and layer
(:mod:`distill.losses.linear_assignment`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from detr.models import Target
from distill.losses.costs import NEVER, MatchingCosts
from distill.losses.linear_assignment import assign
from distill.losses.masks import MaskPredictions
from distill.losses.matches import Matches
from distill.profiler import timed


@timed("matching")
@torch.no_grad()
def match(
    logits: Tensor,
    boxes: Tensor,
    targets: Sequence[Target],
    costs: MatchingCosts | None = None,
    padding: Tensor | None = None,
    no_object: bool = False,
    masks: MaskPredictions | None = None,
) -> Matches:
    """Assigns each ground-truth box the prediction that minimizes the total cost, layer by layer.

    An image with more boxes than queries leaves the worst-fitting boxes without a query.

    Args:
        logits: ``[L, B, N, K]``.
        boxes: ``[L, B, N, 4]`` cx cy w h.
        targets: Ground truth per image.
        costs: Weights of the cost; the usual ones by default.
        padding: ``[B, N]`` bool, queries that only take what no other query is left for.
        no_object: The last logit says "no object", see :class:`MatchingCosts`.
        masks: Of the same predictions, in a detector with masks.

    Returns:
        The assigned pairs on the predictions' device.
    """
    table = (costs or MatchingCosts()).matrix(logits, boxes, targets, no_object, masks)
    return match_costs(table, targets, padding)


@timed("matching")
def match_costs(table: Tensor, targets: Sequence[Target], padding: Tensor | None = None) -> Matches:
    """:func:`match` for costs that are known.

    Args:
        table: ``[L, B, N, G]`` cost of every prediction with every (padded) box of its image.
        targets: Ground truth per image.
        padding: See :func:`match`.
    """
    if padding is not None:
        table = table.masked_fill(padding[None, ..., None], NEVER)
    layers, images, queries, boxes = table.shape
    counts = torch.tensor([len(target.labels) for target in targets]).repeat(layers)
    rows = torch.full_like(counts, queries)
    place, query, box = assign(table.reshape(layers * images, queries, boxes), rows, counts)
    layer = torch.div(place, images, rounding_mode="floor")
    return Matches(layer, place - layer * images, query, box)
