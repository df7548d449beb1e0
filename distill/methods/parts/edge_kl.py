"""How far distributions of edges are from others', as D-FINE's GO-LSD counts it.

Peng et al. 2024, D-FINE, equation 6: decoupled distillation focal loss (DDF). Queries that were
matched and those that were not are averaged apart, and weigh as much as the root of their number.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from detr.models.heads.distribution import edge_distances, edge_places, shared_places
from detr.models.structures import FirstBoxes
from distill.distributed import mean_over_processes
from distill.methods.base import float32


class Halves(NamedTuple):
    """Numbers of matched and other queries, as means over processes."""

    matched: Tensor
    others: Tensor

    @classmethod
    def of(cls, matched: Tensor, padding: Tensor | None = None) -> Halves:
        """Counts ``[B, N]`` queries, fillers aside."""
        others = ~matched if padding is None else ~matched & ~padding
        counts = torch.stack((matched.sum(), others.sum())).float()
        return cls(*mean_over_processes(counts).unbind())


def edge_divergence(student: Tensor, goal: Tensor, temperature: float) -> Tensor:
    """``T^2 * KL(goal || softmax(student / T))``, the mean over edges, ``[B, N]`` float32.

    Args:
        student: ``[B, N, 4, R + 1]`` logits.
        goal: The same, probabilities at this temperature.
        temperature: T.
    """
    log_q = (float32(student) / temperature).log_softmax(-1)
    entropy = torch.special.xlogy(goal, goal).sum(-1)
    loss: Tensor = temperature**2 * (entropy - (goal * log_q).sum(-1)).mean(-1)
    return loss


def decoupled(
    divergence: Tensor, weight: Tensor, matched: Tensor, numbers: Halves, shares: Halves
) -> Tensor:
    """The scalar loss of ``[B, N]`` queries.

    Args:
        divergence: Of each.
        weight: Of each, zero for fillers; without gradient.
        matched: Which stand for an object.
        numbers: Of these and of the others.
        shares: The numbers whose roots weigh the two means.
    """
    weighed = divergence * weight
    total = weighed.new_zeros(())
    for part, count, share in zip((matched, ~matched), numbers, shares, strict=True):
        mean = weighed.masked_fill(~part, 0.0).sum() / count.clamp(min=1)
        total = total + mean * share.sqrt()
    roots = sum(share.sqrt() for share in shares)
    return total / torch.as_tensor(roots).clamp(min=1e-6)


@torch.no_grad()
def carried_over(edges: Tensor, theirs: FirstBoxes, ours: FirstBoxes, temperature: float) -> Tensor:
    """Another detector's distributions as ours would say them.

    Its places lie elsewhere, for its first boxes and perhaps its bins are others. Each place's
    probability goes to the two of our places around it, the nearer one taking more; what lies
    beyond all of ours goes to the outermost.

    Args:
        edges: ``[B, N, 4, R' + 1]`` its logits.
        theirs: Its first boxes.
        ours: Ours, of the same queries.
        temperature: Of the softmax.

    Returns:
        ``[B, N, 4, R + 1]`` probabilities, float32.
    """
    probabilities = (float32(edges) / temperature).softmax(-1)
    places, their_places = (
        edge_places(first.refinement).to(edges.device, non_blocking=True)
        for first in (ours, theirs)
    )
    mine, other = float32(ours.boxes), float32(theirs.boxes)
    scale = ours.refinement.curvature
    start = edge_distances(mine, other, scale)
    ratio = (other[..., 2:] / mine[..., 2:].clamp(min=1e-9)).repeat(1, 1, 2)
    step = ratio * scale / theirs.refinement.curvature
    left, share = shared_places(start[..., None] + step[..., None] * their_places, places)
    goal = probabilities.new_zeros((*edges.shape[:-1], len(places)))
    goal.scatter_add_(-1, left, probabilities * (1 - share))
    return goal.scatter_add_(-1, left + 1, probabilities * share)
