"""The loss of further query groups that are each matched with all objects (Group DETR).

Chen et al. 2023, section 3.2; LW-DETR. The loss of a detector with groups is the mean over them,
so its size does not depend on their number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from detr.models import GroupOutput, Target
from distill.losses.matcher import match
from distill.losses.sets import set_losses, weighted
from distill.losses.weights import LossWeights


def group_count(outputs: Mapping[str, GroupOutput]) -> int:
    """How many groups learn the same: the own one, and every block of ``groups``."""
    return 1 + (outputs["groups"].group.blocks if "groups" in outputs else 0)


def group_losses(
    outputs: Mapping[str, GroupOutput],
    targets: Sequence[Target],
    normalizer: Tensor,
    weights: LossWeights,
) -> dict[str, Tensor]:
    """``groups/...`` and ``groups_proposals/...``; nothing without the group.

    Args:
        outputs: Decoder outputs by role.
        targets: Ground truth per image.
        normalizer: Scalar every sum is divided by, the own group's.
        weights: The recipe's weights.
    """
    if "groups" not in outputs:
        return {}
    output = outputs["groups"]
    proposals = output.group.proposals
    assert proposals is not None
    said = {
        "groups": (torch.stack(output.logits), torch.stack(output.boxes), 1.0),
        "groups_proposals": (proposals.logits[None], proposals.boxes[None], weights.proposals),
    }
    losses: dict[str, Tensor] = {}
    for name, (logits, boxes, factor) in said.items():
        apart, places = (_as_layers(x, output.group.blocks) for x in (logits, boxes))
        matches = match(apart, places, targets, weights.costs)
        parts = set_losses(apart, places, targets, matches, normalizer, scores=weights.scores)
        losses |= weighted(name, parts, weights, factor)
    return losses


def _as_layers(x: Tensor, blocks: int) -> Tensor:
    """``[L, B, G * N, ...]`` as ``[L * G, B, N, ...]``: sums over layers take in groups."""
    return torch.unflatten(x, 2, (blocks, -1)).transpose(1, 2).flatten(0, 1)
