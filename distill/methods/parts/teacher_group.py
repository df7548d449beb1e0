"""The teacher's queries as a further group of the student that also learns the ground truth.

Used by D3ETR (fixed matching) and DETRDistill (query-prior assignment): a query that means the same
to both models may keep the box the teacher's assignment gave it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from detr.models import GroupOutput, Target
from distill.losses.detection import LossWeights, set_losses
from distill.losses.matcher import Matches, join_matches, match
from distill.methods.parts.pairing import Pairs


def teacher_assigned(
    student: GroupOutput,
    teacher: GroupOutput,
    layers: Pairs,
    targets: Sequence[Target],
    cost: tuple[float, float, float],
) -> Matches:
    """The student's own assignment, replaced by the teacher's in some layers.

    Args:
        student: Answers to the teacher's queries.
        teacher: The teacher's answers to the same queries, in the same order.
        layers: (student, teacher) layers in which the teacher's assignment counts.
        targets: Ground truth per image.
        cost: Weights of the matching cost.
    """
    softmax = student.no_object
    own = match(
        torch.stack(student.logits), torch.stack(student.boxes), targets, cost, no_object=softmax
    )
    if not layers:
        return own
    theirs = match(
        torch.stack([teacher.logits[t] for _, t in layers]),
        torch.stack([teacher.boxes[t] for _, t in layers]),
        targets,
        cost,
        no_object=softmax,
    )
    replaced = torch.tensor([s for s, _ in layers], device=own.layer.device)
    kept = own.where(~torch.isin(own.layer, replaced))
    parts = [theirs.at(i, to=s) for i, (s, _) in enumerate(layers)]
    return join_matches([kept, *parts])


def ground_truth_losses(
    output: GroupOutput,
    targets: Sequence[Target],
    matches: Matches,
    normalizer: torch.Tensor,
    weights: LossWeights,
) -> dict[str, torch.Tensor]:
    """The detection loss of a group under a given assignment: ``class``, ``l1`` and ``giou``."""
    parts = set_losses(
        torch.stack(output.logits),
        torch.stack(output.boxes),
        targets,
        matches,
        normalizer,
        output.group.padding,
        weights.no_object if output.no_object else None,
    )
    return {
        "class": weights.focal * parts["class"],
        "l1": weights.l1 * parts["l1"],
        "giou": weights.giou * parts["giou"],
    }
