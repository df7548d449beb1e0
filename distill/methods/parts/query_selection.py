"""QSKD's query selection and alignment: which queries are taught, and which belong together.

Group query selection (GQS, section 3.2) and the local alignment of section 3.4; the global one is
the paper's rival. Everything is indexed over layers and images at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from detr.models import Target
from distill.losses.costs import MatchingCosts, pair_terms
from distill.losses.linear_assignment import assign
from distill.losses.matcher import match_costs
from distill.losses.matches import Matches
from distill.methods.parts.prediction_pairs import (
    PairWeights,
    Predictions,
    assign_parts,
    pair_costs,
)
from distill.profiler import timed

Selection = Literal["positive_hard", "positive", "hard", "easy"]
# Student and teacher queries that belong together, as flat indices over ``[L, B, N]``.
Pairs = tuple[Tensor, Tensor]


@dataclass
class Selected:
    """Queries by what GQS makes of them, ``[L, B, N]`` each; all false without objects.

    Attributes:
        overlap: Generalised IoU with the matched box, else with the best one.
        owner: That box's index within the image.
        positive: Matched to a box.
        hard: Not matched, but overlapping some box by more than tau.
        easy: The rest.
        matches: The assignment behind ``positive``.
    """

    overlap: Tensor
    owner: Tensor
    positive: Tensor
    hard: Tensor
    easy: Tensor
    matches: Matches

    def layers(self, layers: Sequence[int]) -> Selected:
        """Those of some layers, in that order."""
        index = torch.tensor(list(layers)).to(self.owner.device, non_blocking=True)
        return Selected(
            self.overlap[index],
            self.owner[index],
            self.positive[index],
            self.hard[index],
            self.easy[index],
            self.matches.layers(layers),
        )

    def mask(self, select: Selection) -> Tensor:
        """The queries of a selection."""
        if select == "positive_hard":
            return self.positive | self.hard
        chosen: Tensor = getattr(self, select)
        return chosen


@timed("matching")
@torch.no_grad()
def select_queries(
    table: Tensor, targets: list[Target], matches: Matches, threshold: float
) -> Selected:
    """Group query selection (section 3.2).

    Args:
        table: ``[L, B, N, G]`` generalized IoU of every prediction with every (padded) box.
        targets: Ground truth per image.
        matches: Assignment of the same predictions.
        threshold: Tau; strictly above is hard.
    """
    shape, device = table.shape[:-1], table.device
    owner = torch.zeros(shape, dtype=torch.int64, device=device)
    overlap = torch.full(shape, float("-inf"), device=device)
    if table.shape[-1]:
        counts = torch.tensor([len(target.labels) for target in targets])
        present = (torch.arange(table.shape[-1]) < counts[:, None]).to(device, non_blocking=True)
        table = table.masked_fill(~present[None, :, None], float("-inf"))
        overlap, owner = table.max(-1)
        place = (matches.layer, matches.image, matches.query)
        pairs = (*place, matches.box)
        overlap[place], owner[place] = table[pairs], matches.box
    positive = torch.zeros(shape, dtype=torch.bool, device=device)
    positive[matches.layer, matches.image, matches.query] = True
    hard = ~positive & (overlap > threshold)
    easy = ~positive & ~hard & overlap.isfinite()
    return Selected(overlap, owner, positive, hard, easy, matches)


@dataclass(frozen=True)
class Alignment:
    """How the local alignment goes.

    Attributes:
        threshold: Tau of the selection.
        costs: Weights of the matching cost with the ground truth.
        weights: Of the distances between predictions.
        select: Which queries are paired.
        pool: Negatives are assigned per ``box`` or in one pool per ``image``.
    """

    threshold: float
    costs: MatchingCosts
    weights: PairWeights
    select: Selection = "positive_hard"
    pool: Literal["box", "image"] = "box"

    @timed("matching")
    def selection(self, targets: list[Target], predictions: Predictions) -> Selected:
        """GQS on ``[L, B, N, ...]`` predictions."""
        terms = pair_terms(predictions.logits, predictions.boxes, targets)
        matches = match_costs(self.costs.of_terms(terms), targets)
        return select_queries(terms.giou, targets, matches, self.threshold)


@timed("matching")
@torch.no_grad()
def local_pairs(
    targets: list[Target],
    student: Predictions,
    teacher: Predictions,
    how: Alignment,
    theirs: Selected | None = None,
) -> Pairs:
    """LAPD's pairs (section 3.4): matched queries of one box, negatives of one box assigned.

    Args:
        targets: Ground truth per image.
        student: ``[L, B, N, ...]``.
        teacher: ``[L, B, M, ...]``, the layers to compare with.
        how: See :class:`Alignment`.
        theirs: GQS on the teacher's predictions, where it is known.
    """
    ours = how.selection(targets, student)
    theirs = theirs or how.selection(targets, teacher)
    boxes = max(1, *(len(target.labels) for target in targets))
    pairs: list[Pairs] = []
    if how.select in ("positive_hard", "positive"):
        pairs.append(_same_box(ours.matches, theirs.matches, student, teacher, boxes))
    if how.select != "positive":
        kind: Selection = "easy" if how.select == "easy" else "hard"
        chosen = (ours.mask(kind), ours.owner), (theirs.mask(kind), theirs.owner)
        pairs.append(_negatives(student, teacher, *chosen, boxes, how))
    return torch.cat([r for r, _ in pairs]), torch.cat([c for _, c in pairs])


@timed("matching")
@torch.no_grad()
def global_pairs(student: Predictions, teacher: Predictions, weights: PairWeights) -> Pairs:
    """The rival: every query of one model with some query of the other."""
    queries, theirs = student.boxes.shape[2], teacher.boxes.shape[2]
    costs = pair_costs(_by_image(student), _by_image(teacher), weights)
    problem, row, column = assign(costs)
    return problem * queries + row, problem * theirs + column


def flat(predictions: Predictions) -> Predictions:
    """``[L * B * N, ...]``."""
    return Predictions(predictions.logits.flatten(0, 2), predictions.boxes.flatten(0, 2))


def _by_image(predictions: Predictions) -> Predictions:
    """``[L * B, N, ...]``."""
    return Predictions(predictions.logits.flatten(0, 1), predictions.boxes.flatten(0, 1))


def _negatives(
    student: Predictions,
    teacher: Predictions,
    ours: tuple[Tensor, Tensor],
    theirs: tuple[Tensor, Tensor],
    boxes: int,
    how: Alignment,
) -> Pairs:
    """Pairs of negatives of the same box (or image).

    Args:
        student: See :func:`local_pairs`.
        teacher: See there.
        ours: Which of the student's queries, and their boxes, ``[L, B, N]`` each.
        theirs: The same of the teacher.
        boxes: Largest box count.
        how: See :class:`Alignment`.
    """
    if how.pool == "image":
        ours, theirs, boxes = (ours[0], ours[1] * 0), (theirs[0], theirs[1] * 0), 1
    cells = ours[0].shape[0] * ours[0].shape[1] * boxes
    rows, heights = _packed(*ours, boxes, cells)
    columns, widths = _packed(*theirs, boxes, cells)
    busy = ((heights > 0) & (widths > 0)).nonzero()[:, 0]
    sizes = heights[busy], widths[busy]
    return assign_parts(flat(student), flat(teacher), rows[busy], columns[busy], sizes, how.weights)


def _same_box(
    ours: Matches, theirs: Matches, student: Predictions, teacher: Predictions, boxes: int
) -> Pairs:
    """The queries that both models matched to the same box of the same layer."""
    layers, images = student.boxes.shape[:2]
    found = []
    for matches, queries in ((ours, student.boxes.shape[2]), (theirs, teacher.boxes.shape[2])):
        image = matches.layer * images + matches.image
        table = torch.full((layers * images * boxes,), -1, device=image.device)
        table[image * boxes + matches.box] = image * queries + matches.query
        found.append(table)
    both = (found[0] >= 0) & (found[1] >= 0)
    kept = both.nonzero()[:, 0]
    return found[0][kept], found[1][kept]


def _packed(mask: Tensor, owner: Tensor, boxes: int, cells: int) -> tuple[Tensor, Tensor]:
    """The chosen queries of every (layer, image, box), filled up to the longest list.

    Args:
        mask: ``[L, B, N]`` bool.
        owner: ``[L, B, N]`` box of each query.
        boxes: Boxes per image, the largest count.
        cells: L * B * boxes.

    Returns:
        ``[cells, longest]`` flat query indices (fillers are 0) and ``[cells]`` lengths.
    """
    flat = mask.flatten().nonzero()[:, 0]
    cell = flat // mask.shape[2] * boxes + owner.flatten()[flat]
    order = cell.argsort(stable=True)
    flat, cell = flat[order], cell[order]
    counts = torch.bincount(cell, minlength=cells)
    place = torch.arange(len(flat), device=flat.device) - (counts.cumsum(0) - counts)[cell]
    table = flat.new_zeros(cells, int(counts.max()) if cells else 0)
    table[cell, place] = flat
    return table, counts
