"""The teacher's queries as a further group of the student that also learns the ground truth.

Used by D3ETR (fixed matching) and DETRDistill (query-prior assignment): a query that means the same
to both models may keep the box the teacher's assignment gave it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from detr.models import GroupOutput, Target
from distill.losses.costs import MatchingCosts
from distill.losses.matcher import match
from distill.losses.matches import Matches, join_matches
from distill.losses.sets import set_losses
from distill.losses.weights import LossWeights


def layer_matches(
    output: GroupOutput, layers: Sequence[int], targets: Sequence[Target], costs: MatchingCosts
) -> Matches:
    """The assignment of the ground truth in some layers, as layers 0, 1, ... in that order."""
    return match(
        torch.stack([output.logits[i] for i in layers]),
        torch.stack([output.boxes[i] for i in layers]),
        targets,
        costs,
        no_object=output.no_object,
    )


def teacher_assigned(
    student: GroupOutput,
    layers: Sequence[int],
    teacher: Matches | None,
    targets: Sequence[Target],
    costs: MatchingCosts,
) -> Matches:
    """The student's own assignment, replaced by the teacher's in some layers.

    Args:
        student: Answers to the teacher's queries.
        layers: Student layers in which the teacher's assignment counts.
        teacher: That assignment of the same queries, in the same order: layer i is for the i-th of
            the layers. ``None`` where there are none.
        targets: Ground truth per image.
        costs: Weights of the matching cost.
    """
    own = layer_matches(student, range(len(student.logits)), targets, costs)
    if teacher is None:
        return own
    replaced = torch.tensor(layers).to(own.layer.device, non_blocking=True)
    rest = own.where(~torch.isin(own.layer, replaced))
    return join_matches([rest, *(teacher.at(i, to=s) for i, s in enumerate(layers))])


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
        weights.scores,
    )
    return {
        "class": weights.focal * parts["class"],
        "l1": weights.l1 * parts["l1"],
        "giou": weights.giou * parts["giou"],
    }
