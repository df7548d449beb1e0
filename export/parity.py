"""Whether two engines find the same things: a comparison of detections, not of raw tensors.

Raw outputs are the wrong thing to compare: two equal scores may swap places in the ranking, which
moves whole rows and means nothing, while a half-pixel shift of every box is a small number and
ruins AP.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

from detr.config import Strict
from detr.types import Detections

# Two boxes show the same thing if they overlap by half.
_SAME = 0.5

Matrix = npt.NDArray[np.float64]


class Budget(Strict):
    """How far apart two engines may be.

    Attributes:
        score: Largest difference of a matched score.
        box_px: Largest difference of a matched box coordinate, pixels of the original image.
        missing, extra, class_flips: How many detections may be gone, new or of another class.
    """

    score: float = 1e-3
    box_px: float = 0.5
    missing: int = 0
    extra: int = 0
    class_flips: int = 0


class Parity(BaseModel):
    """How far a candidate's detections are from the reference's.

    Attributes:
        images: Number of images compared.
        matched: Detections found by both, one to one by class and overlap.
        missing: Detections of the reference the candidate lacks.
        extra: Detections of the candidate the reference lacks.
        class_flips: Detections at the same place with another class.
        max_box_px: Largest coordinate difference of a matched box, pixels of the original image.
        max_score: Largest score difference of a match.
        worst_image: Index of the image with the largest deviation.
    """

    images: int = 0
    matched: int = 0
    missing: int = 0
    extra: int = 0
    class_flips: int = 0
    max_box_px: float = 0.0
    max_score: float = 0.0
    worst_image: int = 0

    def over(self, budget: Budget) -> list[str]:
        """What exceeds the budget, one phrase each; empty where nothing does."""
        checks = (
            ("missing detections", self.missing, budget.missing),
            ("extra detections", self.extra, budget.extra),
            ("class flips", self.class_flips, budget.class_flips),
            ("px box difference", self.max_box_px, budget.box_px),
            ("score difference", self.max_score, budget.score),
        )
        # Written so that a NaN is over every budget.
        return [
            f"{value:.4g} {what} (at most {most:g})"
            for what, value, most in checks
            if not value <= most
        ]

    def summary(self) -> str:
        """One line for a person."""
        return (
            f"{self.matched} detections on {self.images} images: "
            f"boxes within {self.max_box_px:.2g} px, scores within {self.max_score:.2g}, "
            f"{self.missing} missing, {self.extra} extra, {self.class_flips} class flips"
        )


def compare(
    reference: Sequence[Detections],
    candidate: Sequence[Detections],
    score: float = 0.3,
    at_least: int = 10,
    budget: Budget | None = None,
) -> Parity:
    """Compares detections image by image.

    Args:
        reference: What must be reproduced.
        candidate: What was found instead.
        score: Detections from this score on are compared.
        at_least: As many of the best are compared where fewer reach ``score``, so that a timid
            model is not passed for want of detections.
        budget: Its ``score`` is the slack with which a detection at the threshold may fall to
            either side.

    Raises:
        ValueError: Different numbers of images.
    """
    if len(reference) != len(candidate):
        raise ValueError(f"{len(reference)} images against {len(candidate)}")
    slack = (budget or Budget()).score
    total = Parity()
    worst = -1.0
    for index, (expected, found) in enumerate(zip(reference, candidate, strict=True)):
        one = _compare_image(expected, found, score, at_least, slack)
        deviation = one.missing + one.extra + one.class_flips + one.max_box_px + one.max_score
        if not deviation <= worst:
            worst, total.worst_image = deviation, index
        total.images += 1
        for name in ("matched", "missing", "extra", "class_flips"):
            setattr(total, name, getattr(total, name) + getattr(one, name))
        # np.maximum hands a NaN on, max() may drop it.
        total.max_box_px = float(np.maximum(total.max_box_px, one.max_box_px))
        total.max_score = float(np.maximum(total.max_score, one.max_score))
    return total


def _compare_image(
    expected: Detections, found: Detections, score: float, at_least: int, slack: float
) -> Parity:
    threshold = score
    if len(expected) > 0:
        threshold = min(score, float(expected.scores[min(at_least, len(expected)) - 1]))
    # Partners are looked for below the threshold too: 0.3001 against 0.2999 is no loss.
    expected = expected.above(threshold - slack)
    finite = np.isfinite(found.scores) & np.isfinite(found.boxes).all(1)
    broken = int((~finite).sum())
    found = Detections(found.boxes[finite], found.scores[finite], found.labels[finite])
    found = found.above(threshold - slack)

    likeness = _likeness(expected.boxes, found.boxes)
    same_class = expected.labels[:, None] == found.labels[None]
    score_gap = np.abs(expected.scores[:, None].astype(np.float64) - found.scores[None])
    pairs = _match(np.where(same_class, likeness, 0.0), score_gap)
    rest_e = _rest(len(expected), [i for i, _ in pairs])
    rest_f = _rest(len(found), [j for _, j in pairs])
    rest_e = [i for i in rest_e if expected.scores[i] >= threshold]
    rest_f = [j for j in rest_f if found.scores[j] >= threshold]
    flips = _match(likeness[np.ix_(rest_e, rest_f)], score_gap[np.ix_(rest_e, rest_f)])

    # A pair wholly below the threshold was only a possible partner.
    pairs = [p for p in pairs if max(expected.scores[p[0]], found.scores[p[1]]) >= threshold]
    result = Parity(
        images=1,
        matched=len(pairs),
        missing=len(rest_e) - len(flips),
        extra=len(rest_f) - len(flips) + broken,
        class_flips=len(flips),
    )
    if pairs:
        rows, columns = (list(side) for side in zip(*pairs, strict=True))
        gaps = np.abs(expected.boxes[rows].astype(np.float64) - found.boxes[columns])
        result.max_box_px = float(gaps.max())
        result.max_score = float(score_gap[rows, columns].max())
    return result


def _likeness(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> Matrix:
    """``[N, M]`` IoU, or one minus the distance in pixels where that is more.

    The distance speaks for boxes without area, cut off at the image's edge, whose IoU is undefined.
    """
    first, second = a.astype(np.float64)[:, None], b.astype(np.float64)[None]
    low = np.maximum(first[..., :2], second[..., :2])
    high = np.minimum(first[..., 2:], second[..., 2:])
    common = np.clip(high - low, 0, None).prod(-1)
    areas = [np.clip(x[..., 2:] - x[..., :2], 0, None).prod(-1) for x in (first, second)]
    union = areas[0] + areas[1] - common
    iou = common / np.where(union > 0, union, 1.0)
    distance = np.abs(first - second).max(-1)
    likeness: Matrix = np.maximum(iou, 1.0 - distance)
    return likeness


def _match(likeness: Matrix, score_gap: Matrix) -> list[tuple[int, int]]:
    """Greedy one-to-one matching, most alike first; among equals the closest score decides."""
    rows, columns = np.nonzero(likeness >= _SAME)
    order = np.argsort(-(likeness[rows, columns] - score_gap[rows, columns]), kind="stable")
    pairs: list[tuple[int, int]] = []
    used_rows: set[int] = set()
    used_columns: set[int] = set()
    for k in order:
        i, j = int(rows[k]), int(columns[k])
        if i not in used_rows and j not in used_columns:
            used_rows.add(i)
            used_columns.add(j)
            pairs.append((i, j))
    return pairs


def _rest(count: int, used: list[int]) -> list[int]:
    taken = set(used)
    return [i for i in range(count) if i not in taken]
