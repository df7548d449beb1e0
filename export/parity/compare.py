"""Whether two engines find the same things: a comparison of detections, not of raw tensors.

Raw outputs are the wrong thing to compare: two equal scores may swap places in the ranking, which
moves whole rows and means nothing, while a half-pixel shift of every box is a small number and
ruins AP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Field

from detr.config import Strict
from detr.types import Detections

# Two boxes show the same thing if they overlap by half.
_SAME = 0.5

# Share of detections below the threshold that may differ.
_DOUBTFUL = 0.25
_SHARES = ("missing", "extra", "class_flips")

Matrix = npt.NDArray[np.float64]


class Budget(Strict):
    """How far apart two engines may be.

    Attributes:
        threshold: Score from which a detection counts.
        detections: The reference must find this many above the threshold over all images, or there
            is nothing to judge by.
        best: Where it finds fewer, this many of the best of each image are compared.
        score, box_px: Largest difference of a matched score, and of a matched box coordinate in
            pixels of the original image.
        score_median, box_px_median: Largest median of the same over all matches: a shift of every
            box is seen here long before it is seen in the maximum.
        missing, extra, class_flips: Share of the reference's detections that may be gone, new or of
            another class.
        ap: Largest difference of COCO AP, where the images have labels.
    """

    threshold: Annotated[float, Field(ge=0, le=1)] = 0.3
    detections: Annotated[int, Field(ge=1)] = 10
    best: Annotated[int, Field(ge=0)] = 10
    score: Annotated[float, Field(ge=0)] = 0.01
    score_median: Annotated[float, Field(ge=0)] = 1e-4
    box_px: Annotated[float, Field(ge=0)] = 0.5
    box_px_median: Annotated[float, Field(ge=0)] = 0.02
    missing: Annotated[float, Field(ge=0, le=1)] = 0.0
    extra: Annotated[float, Field(ge=0, le=1)] = 0.0
    class_flips: Annotated[float, Field(ge=0, le=1)] = 0.0
    ap: Annotated[float, Field(ge=0, le=1)] = 0.0005

    def wider_than(self, usual: Budget) -> list[str]:
        """One line where this budget allows more than the usual one; empty where it does not."""
        fields = {name: (getattr(self, name), getattr(usual, name)) for name in Budget.model_fields}
        wider = [
            f"{name} {own:g} (usually {other:g})"
            for name, (own, other) in fields.items()
            if (own < other if name in ("detections", "best") else own > other)
        ]
        return [f"by a budget wider than the usual one: {', '.join(wider)}"] if wider else []

    def for_doubtful(self) -> Budget:
        """What is allowed among detections no one would act on.

        There proposals of nearly equal scores trade places even between two healthy runtimes, so
        only what concerns most of them counts.
        """
        return self.model_copy(
            update={
                "score": 1.0,
                "box_px": float("inf"),
                **{name: max(getattr(self, name), _DOUBTFUL) for name in _SHARES},
            }
        )


class Parity(BaseModel):
    """How far a candidate's detections are from the reference's.

    Attributes:
        images: Number of images compared.
        detections: What the reference finds above the threshold.
        matched: Detections found by both, one to one by class and overlap.
        missing: Detections of the reference the candidate lacks.
        extra: Detections of the candidate the reference lacks.
        class_flips: Detections at the same place with another class.
        not_finite: Detections of the candidate with a NaN or an infinity.
        short: Images with another number of rows, whatever their scores: a list cut short.
        max_box_px, median_box_px: Coordinate difference of a matched box (the largest of its four),
            pixels of the original image.
        max_score, median_score: Score difference of a match.
        worst_image: Index of the image with the largest deviation.
        deviating: Images on which something exceeds the budget by itself, worst first.
    """

    images: int = 0
    detections: int = 0
    matched: int = 0
    missing: int = 0
    extra: int = 0
    class_flips: int = 0
    not_finite: int = 0
    short: int = 0
    max_box_px: float = 0.0
    median_box_px: float = 0.0
    max_score: float = 0.0
    median_score: float = 0.0
    worst_image: int = 0
    deviating: list[int] = []

    def over(self, budget: Budget) -> list[str]:
        """What exceeds the budget, one phrase each; empty where nothing does."""
        if self.detections < budget.detections:
            budget = budget.for_doubtful()
        expected = self.matched + self.missing + self.class_flips
        counts = (
            ("missing detections", self.missing, budget.missing),
            ("extra detections", self.extra, budget.extra),
            ("class flips", self.class_flips, budget.class_flips),
            ("detections that are no numbers", self.not_finite, 0.0),
            ("images with another number of rows", self.short, 0.0),
        )
        differences = (
            ("px box difference", self.max_box_px, budget.box_px),
            ("px median box difference", self.median_box_px, budget.box_px_median),
            ("score difference", self.max_score, budget.score),
            ("median score difference", self.median_score, budget.score_median),
        )
        reasons = [
            f"{count} {what} (of {expected} detections; at most {share * expected:.3g})"
            for what, count, share in counts
            if count > share * expected
        ]
        # Written so that a NaN is over every budget.
        return reasons + [
            f"{value:.4g} {what} (at most {most:g})"
            for what, value, most in differences
            if not value <= most
        ]

    def summary(self) -> str:
        """One line for a person."""
        return (
            f"{self.matched} detections on {self.images} images ({self.detections} above the "
            "threshold): "
            f"boxes within {self.max_box_px:.2g} px (median {self.median_box_px:.2g}), "
            f"scores within {self.max_score:.2g} (median {self.median_score:.2g}), "
            f"{self.missing} missing, {self.extra} extra, {self.class_flips} class flips"
        )


class Outcome(BaseModel):
    """Everything a budget speaks of.

    Attributes:
        parity: The comparison of the detections.
        ap, reference_ap: COCO AP of candidate and reference; ``None`` where there are no labels.
    """

    parity: Parity
    ap: float | None = None
    reference_ap: float | None = None

    def over(self, budget: Budget) -> list[str]:
        """What exceeds the budget, one phrase each; empty where nothing does."""
        reasons = self.parity.over(budget)
        if self.ap is None or self.reference_ap is None:
            return reasons
        # Written so that a NaN is over every budget.
        if not abs(self.ap - self.reference_ap) <= budget.ap:
            reasons.append(
                f"AP {self.ap:.4f} instead of {self.reference_ap:.4f} (at most {budget.ap:g} apart)"
            )
        return reasons

    def summary(self) -> str:
        """One line for a person."""
        if self.ap is None or self.reference_ap is None:
            return self.parity.summary()
        return f"{self.parity.summary()}, AP {self.ap - self.reference_ap:+.4f}"


def compare(
    reference: Sequence[Detections],
    candidate: Sequence[Detections],
    budget: Budget | None = None,
) -> Parity:
    """Compares detections image by image.

    Args:
        reference: What must be reproduced.
        candidate: What was found instead.
        budget: Says which detections count. Its ``score`` is also the slack with which a detection
            at the threshold may fall to either side.

    Raises:
        ValueError: Different numbers of images.
    """
    if len(reference) != len(candidate):
        raise ValueError(f"{len(reference)} images against {len(candidate)}")
    budget = budget or Budget()
    total = Parity(images=len(reference))
    total.detections = sum(int((one.scores >= budget.threshold).sum()) for one in reference)
    if total.detections >= budget.detections:
        budget = budget.model_copy(update={"best": 0})
    pixels, scores = [np.zeros(0)], [np.zeros(0)]
    deviations: list[tuple[float, int, bool]] = []
    for index, (expected, found) in enumerate(zip(reference, candidate, strict=True)):
        one = _compare_image(expected, found, budget)
        total.short += len(expected) != len(found)
        for name in ("matched", "missing", "extra", "class_flips", "not_finite"):
            setattr(total, name, getattr(total, name) + getattr(one, name))
        pixels.append(one.box_px)
        scores.append(one.score)
        deviations.append((one.deviation(), -index, one.exceeds(budget)))
    all_pixels, all_scores = np.concatenate(pixels), np.concatenate(scores)
    if len(all_pixels):
        total.max_box_px, total.median_box_px = _largest_and_median(all_pixels)
        total.max_score, total.median_score = _largest_and_median(all_scores)
    deviations.sort(reverse=True)
    if deviations:
        total.worst_image = -deviations[0][1]
    total.deviating = [-index for _, index, exceeds in deviations if exceeds]
    return total


def _largest_and_median(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    return float(values.max()), float(np.median(values))


@dataclass
class _Image:
    """The comparison of one image; ``box_px`` and ``score`` have one entry per match."""

    matched: int
    missing: int
    extra: int
    class_flips: int
    not_finite: int
    box_px: npt.NDArray[np.float64]
    score: npt.NDArray[np.float64]

    def deviation(self) -> float:
        """How bad it is, to sort by."""
        counted = self.missing + self.extra + self.class_flips + self.not_finite
        return counted + float(self.box_px.max(initial=0.0) + self.score.max(initial=0.0))

    def exceeds(self, budget: Budget) -> bool:
        """Whether anything on this image is out of the ordinary."""
        return (
            self.missing + self.extra + self.class_flips + self.not_finite > 0
            or float(self.box_px.max(initial=0.0)) > budget.box_px
            or float(self.score.max(initial=0.0)) > budget.score
        )


def _compare_image(expected: Detections, found: Detections, budget: Budget) -> _Image:
    threshold, slack = budget.threshold, budget.score
    if budget.best and len(expected) > 0:
        threshold = min(threshold, float(expected.scores[min(budget.best, len(expected)) - 1]))
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
    rows, columns = [i for i, _ in pairs], [j for _, j in pairs]
    gaps = np.abs(expected.boxes[rows].astype(np.float64) - found.boxes[columns])
    return _Image(
        matched=len(pairs),
        missing=len(rest_e) - len(flips),
        extra=len(rest_f) - len(flips),
        class_flips=len(flips),
        not_finite=broken,
        box_px=gaps.max(1, initial=0.0),
        score=score_gap[rows, columns],
    )


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
