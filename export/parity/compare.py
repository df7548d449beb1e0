"""Whether two engines find the same things: a comparison of detections, not of raw tensors.

Raw outputs are the wrong thing to compare: two equal scores may swap places in the ranking, which
moves whole rows and means nothing, while a half-pixel shift of every box is a small number and
ruins AP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from detr.masks import overlap
from detr.types import Detections
from engines.parity import Budget, Parity

# Two boxes show the same thing if they overlap by half.
_SAME = 0.5

Matrix = npt.NDArray[np.float64]


def compare_detections(
    reference: Sequence[Detections],
    candidate: Sequence[Detections],
    budget: Budget | None = None,
) -> Parity:
    """Compares detections image by image.

    Args:
        reference: What must be reproduced.
        candidate: What another engine finds in the same images.
        budget: Says which detections count. Its ``score`` is also the slack with which a detection
            at the threshold may fall to either side.

    Raises:
        ValueError: Different numbers of images.
    """
    if len(reference) != len(candidate):
        raise ValueError(f"{len(reference)} images against {len(candidate)}")
    budget = budget or Budget()
    above = sum(int((one.scores >= budget.threshold).sum()) for one in reference)
    if above >= budget.detections:
        budget = budget.model_copy(update={"best": 0})
    images = [_compare_image(a, b, budget) for a, b in zip(reference, candidate, strict=True)]
    worst_first = sorted(
        ((one.deviation(), -index) for index, one in enumerate(images)), reverse=True
    )
    order = [-index for _, index in worst_first]
    max_box_px, median_box_px = _largest_and_median([one.box_px for one in images])
    max_score, median_score = _largest_and_median([one.score for one in images])
    apart = [1.0 - one.mask_iou for one in images if one.mask_iou is not None]
    least_alike = _largest_and_median(apart) if apart else None
    return Parity(
        images=len(images),
        detections=above,
        matched=sum(one.matched for one in images),
        missing=sum(one.missing for one in images),
        extra=sum(one.extra for one in images),
        class_flips=sum(one.class_flips for one in images),
        not_finite=sum(one.not_finite for one in images),
        short=sum(len(a) != len(b) for a, b in zip(reference, candidate, strict=True)),
        max_box_px=max_box_px,
        median_box_px=median_box_px,
        max_score=max_score,
        median_score=median_score,
        min_mask_iou=None if least_alike is None else 1.0 - least_alike[0],
        median_mask_iou=None if least_alike is None else 1.0 - least_alike[1],
        worst_image=order[0] if order else 0,
        deviating=tuple(index for index in order if images[index].exceeds(budget)),
    )


def _largest_and_median(groups: Sequence[npt.NDArray[np.float64]]) -> tuple[float, float]:
    values = np.concatenate([np.zeros(0), *groups])
    return (float(values.max()), float(np.median(values))) if len(values) else (0.0, 0.0)


@dataclass(frozen=True)
class _Image:
    """The comparison of one image; arrays have one entry per match.

    ``mask_iou`` is ``None`` where the reference has no masks.
    """

    matched: int
    missing: int
    extra: int
    class_flips: int
    not_finite: int
    box_px: npt.NDArray[np.float64]
    score: npt.NDArray[np.float64]
    mask_iou: npt.NDArray[np.float64] | None

    @property
    def _mask_gap(self) -> float:
        """The largest part in which a mask differs."""
        return 0.0 if self.mask_iou is None else 1.0 - float(self.mask_iou.min(initial=1.0))

    def deviation(self) -> float:
        """How bad it is, to sort by."""
        counted = self.missing + self.extra + self.class_flips + self.not_finite
        values = float(self.box_px.max(initial=0.0) + self.score.max(initial=0.0))
        return counted + values + self._mask_gap

    def exceeds(self, budget: Budget) -> bool:
        """Whether anything on this image is out of the ordinary."""
        return (
            self.missing + self.extra + self.class_flips + self.not_finite > 0
            or float(self.box_px.max(initial=0.0)) > budget.box_px
            or float(self.score.max(initial=0.0)) > budget.score
            or self._mask_gap > 1.0 - (budget.mask_iou or 0.0)
        )


def _compare_image(expected: Detections, found: Detections, budget: Budget) -> _Image:
    threshold, slack = budget.threshold, budget.score
    if budget.best and len(expected) > 0:
        threshold = min(threshold, float(expected.scores[min(budget.best, len(expected)) - 1]))
    # Partners are looked for below the threshold too: 0.3001 against 0.2999 is no loss.
    expected = expected.above(threshold - slack)
    finite = np.isfinite(found.scores) & np.isfinite(found.boxes).all(1)
    broken = int((~finite).sum())
    found = found.take(np.flatnonzero(finite))
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
        mask_iou=_mask_iou(expected.take(np.array(rows, np.int64)), found, columns),
    )


def _mask_iou(
    expected: Detections, found: Detections, partners: Sequence[int]
) -> npt.NDArray[np.float64] | None:
    """IoU of each mask with its partner's; a mask that is not there is an empty one."""
    if expected.masks is None:
        return None
    if found.masks is None:
        empty = np.array([mask.area == 0 for mask in expected.masks])
        return empty.astype(np.float64)
    return np.array(
        [overlap(one, found.masks[j]) for one, j in zip(expected.masks, partners, strict=True)]
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
