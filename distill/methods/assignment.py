"""One-to-one assignment between a student's and a teacher's predictions, and what pairs cost.

Costs are computed in batches of tensor operations; the class term is one matrix product, because
``BCE(s, t) = softplus(z) - t * z`` is linear in the teacher's scores. The assignments themselves
run in as many threads as there are cores (scipy lets go of Python's lock).
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from detr.models import cxcywh_to_xyxy
from distill.boxes import giou
from distill.methods.base import float32

# Entries of a cost tensor that are computed at once; bounds memory, not results.
_CHUNK = 2**21
# Below this many cost entries a problem is solved faster than it is handed to a thread.
_SMALL = 2**12
_NEVER = 1e6


@dataclass(frozen=True)
class PairWeights:
    """Weights of the three distances between two predictions.

    Attributes:
        classes: Of the binary cross-entropy to the teacher's sigmoid scores.
        l1: Of the boxes' L1 distance, summed over coordinates.
        giou: Of one minus the generalised IoU.
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

    def __getitem__(self, index: slice | tuple[Tensor, ...] | Tensor) -> Predictions:
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
    size = max(1, student.boxes.shape[1] * teacher.boxes.shape[1])
    step = max(1, _CHUNK // size)
    parts = [
        _costs(student[p : p + step], teacher[p : p + step], weights)
        for p in range(0, len(student.boxes), step)
    ]
    shape = (0, student.boxes.shape[1], teacher.boxes.shape[1])
    return torch.cat(parts) if parts else student.boxes.new_zeros(shape)


def _costs(student: Predictions, teacher: Predictions, weights: PairWeights) -> Tensor:
    logits, scores = float32(student.logits), float32(teacher.logits).sigmoid()
    entropy = F.softplus(logits).sum(-1)[..., None] - logits @ scores.transpose(-1, -2)
    if weights.mean:
        entropy = entropy / logits.shape[-1]
    ours, theirs = float32(student.boxes), float32(teacher.boxes)
    overlap = giou(cxcywh_to_xyxy(ours)[:, :, None], cxcywh_to_xyxy(theirs)[:, None])
    l1 = torch.cdist(ours, theirs, p=1)
    cost = weights.classes * entropy + weights.l1 * l1 + weights.giou * (1 - overlap)
    return cost.nan_to_num(_NEVER, _NEVER, -_NEVER)


def assign(
    costs: Tensor, rows: Tensor | None = None, columns: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Solves many assignment problems.

    Args:
        costs: ``[P, N, M]``.
        rows: ``[P]`` how many leading rows of each problem count; all by default.
        columns: The same for columns.

    Returns:
        Problem, row and column of every assigned pair, ``[R]`` each on the costs' device, ordered
        by problem and row; a problem has as many pairs as it has rows or columns, the fewer.
    """
    number, height, width = costs.shape
    heights = np.full(number, height) if rows is None else rows.cpu().numpy()
    widths = np.full(number, width) if columns is None else columns.cpu().numpy()
    table = costs.cpu().numpy()

    def solve(p: int) -> tuple[np.ndarray, np.ndarray]:
        found: tuple[np.ndarray, np.ndarray] = linear_sum_assignment(
            table[p, : heights[p], : widths[p]]
        )
        return found

    if number > 1 and height * width > _SMALL:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            solved = list(pool.map(solve, range(number)))
    else:
        solved = [solve(p) for p in range(number)]
    problems = np.repeat(np.arange(number), [len(r) for r, _ in solved])
    flat = [np.concatenate([s[i] for s in solved]) if solved else problems for i in (0, 1)]
    table_ = torch.from_numpy(np.stack((problems, *flat)).astype(np.int64)).to(costs.device)
    return table_[0], table_[1], table_[2]
