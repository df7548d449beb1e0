"""One-to-one assignment between a student's and a teacher's predictions, and what pairs cost.

Costs are computed in batches of tensor operations; the class term is one matrix product, because
``BCE(s, t) = softplus(z) - t * z`` is linear in the teacher's scores. Problems of different sizes
are computed in the order of their size, so that filling up costs little.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from detr.models import cxcywh_to_xyxy
from distill.losses.linear_assignment import assign
from distill.losses.overlap import giou, pairwise_giou
from distill.methods.base import float32
from distill.profiler import timed

# Entries of a cost tensor that are computed at once: bounds memory, not results. On a CPU the few
# tensors in use stay in its cache.
_CHUNK, _CACHED = 2**21, 2**17
# Problems share a tensor up to this ratio of its size to the smallest one's, unless it is so small
# that a call costs more than filling up.
_FILL, _SMALL = 3, 2**15
_NEVER = 1e6


@dataclass(frozen=True)
class PairWeights:
    """Weights of the three distances between two predictions.

    Attributes:
        classes: Of the binary cross-entropy to the teacher's sigmoid scores.
        l1: Of the boxes' L1 distance, summed over coordinates.
        giou: Of one minus the generalized IoU.
        mean: Divide the cross-entropy by the number of classes (else the sum over classes).
    """

    classes: float
    l1: float
    giou: float
    mean: bool = False


@dataclass
class Predictions:
    """Predictions of several problems, ``[P, N, K]`` logits and ``[P, N, 4]`` cx cy w h boxes."""

    logits: Tensor
    boxes: Tensor

    def __getitem__(self, index: slice | tuple[Tensor | slice, ...] | Tensor) -> Predictions:
        """The same part of both."""
        return Predictions(self.logits[index], self.boxes[index])

    def detach(self) -> Predictions:
        """Without gradient."""
        return Predictions(self.logits.detach(), self.boxes.detach())


@dataclass
class Distances:
    """Distances of R pairs, ``[R]`` each, float32; see :class:`PairWeights`."""

    classes: Tensor
    l1: Tensor
    giou: Tensor

    def weighted(self, weights: PairWeights) -> dict[str, Tensor]:
        """The weighted distances under ``class``, ``l1`` and ``giou``."""
        return {
            "class": weights.classes * self.classes,
            "l1": weights.l1 * self.l1,
            "giou": weights.giou * self.giou,
        }


def distances(student: Predictions, teacher: Predictions, mean: bool = False) -> Distances:
    """Distances of pairs: both sides ``[R, K]`` and ``[R, 4]``; the teacher gets no gradient."""
    teacher = teacher.detach()
    scores = float32(teacher.logits).sigmoid()
    entropy = F.binary_cross_entropy_with_logits(float32(student.logits), scores, reduction="none")
    ours, theirs = float32(student.boxes), float32(teacher.boxes)
    return Distances(
        entropy.mean(-1) if mean else entropy.sum(-1),
        (ours - theirs).abs().sum(-1),
        1 - giou(cxcywh_to_xyxy(ours), cxcywh_to_xyxy(theirs)),
    )


@timed("matching")
@torch.no_grad()
def pair_costs(student: Predictions, teacher: Predictions, weights: PairWeights) -> Tensor:
    """Cost of every student prediction with every teacher prediction of its problem.

    Args:
        student: ``[P, N, ...]``.
        teacher: ``[P, M, ...]``.
        weights: Of the distances.

    Returns:
        ``[P, N, M]`` float32, finite.
    """
    problems, height, width = len(student.boxes), student.boxes.shape[1], teacher.boxes.shape[1]
    costs = student.boxes.new_empty((problems, height, width), dtype=torch.float32)
    block = _CACHED if costs.device.type == "cpu" else _CHUNK
    # Whole problems as long as they fit, else the rows of one.
    together = max(1, block // max(1, height * width))
    rows = height if together > 1 else max(1, block // max(1, width))
    for p in range(0, problems, together):
        some = slice(p, p + together)
        _write_costs(costs[some], student[some], teacher[some], weights, max(1, rows))
    return costs


def _write_costs(
    costs: Tensor, student: Predictions, teacher: Predictions, weights: PairWeights, rows: int
) -> None:
    """Writes the costs of some problems, so many rows at a time."""
    logits, scores = float32(student.logits), float32(teacher.logits).sigmoid()
    share = weights.classes / (logits.shape[-1] if weights.mean else 1)
    # What a pair costs by its student query alone goes through the product as one more class.
    alone = share * F.softplus(logits).sum(-1, keepdim=True) + weights.giou
    left = torch.cat((logits * -share, alone), -1)
    right = torch.cat((scores, scores.new_ones((*scores.shape[:-1], 1))), -1).mT
    ours, theirs = float32(student.boxes), float32(teacher.boxes)
    corners, others = cxcywh_to_xyxy(ours), cxcywh_to_xyxy(theirs)
    planes = theirs.mT.contiguous()
    for row in range(0, costs.shape[1], rows):
        part = slice(None), slice(row, row + rows)
        cost = pairwise_giou(corners[part], others).mul_(-weights.giou)
        for side in range(4):
            gap = ours[part][..., side, None] - planes[:, None, side]
            cost.add_(gap.abs_(), alpha=weights.l1)
        costs[part] = cost.baddbmm_(left[part], right).nan_to_num_(_NEVER, _NEVER, -_NEVER)


@timed("matching")
@torch.no_grad()
def assign_parts(
    student: Predictions,
    teacher: Predictions,
    rows: Tensor,
    columns: Tensor,
    sizes: tuple[Tensor, Tensor],
    weights: PairWeights,
) -> tuple[Tensor, Tensor]:
    """Assigns small parts of the predictions to each other.

    Args:
        student: ``[R, ...]``, of all problems.
        teacher: ``[S, ...]``.
        rows: ``[P, N]`` which student predictions a problem has; the first of each row count.
        columns: ``[P, M]`` the same of the teacher's.
        sizes: ``[P]`` each, at least 1: how many count.
        weights: Of the distances.

    Returns:
        Student and teacher prediction of every pair.
    """
    heights, widths = sizes
    order = (heights * widths).argsort()
    tall, wide = heights[order].tolist(), widths[order].tolist()
    found: list[tuple[Tensor, Tensor]] = []
    start = 0
    while start < len(order):
        # As many problems, each filled up to the largest of them, as fit into a chunk.
        stop, height, width = start, 0, 0
        while stop < len(order):
            grown = max(height, tall[stop]), max(width, wide[stop])
            entries = grown[0] * grown[1] * (stop + 1 - start)
            filled = grown[0] * grown[1] > _FILL * tall[start] * wide[start]
            if stop > start and (entries > _CHUNK or (filled and entries > _SMALL)):
                break
            height, width = grown
            stop += 1
        part = order[start:stop]
        row, column = rows[part, :height], columns[part, :width]
        costs = pair_costs(student[row], teacher[column], weights)
        problem, i, j = assign(costs, heights[part], widths[part])
        found.append((row[problem, i], column[problem, j]))
        start = stop
    if not found:
        return rows.new_zeros(0), rows.new_zeros(0)
    return torch.cat([r for r, _ in found]), torch.cat([c for _, c in found])
