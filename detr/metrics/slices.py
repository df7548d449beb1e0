"""Accuracy on parts of the objects or images: near and far, visible and occluded, day and night.

Every detection is matched once, with all objects (:mod:`detr.metrics.outcomes`). In a slice an
object of another slice is neither to be found nor wrong to find, as in KITTI's difficulties and
COCO's sizes. A false alarm has no distance and no occlusion, so it counts in every slice of objects
but those of size, where it has its own: precision of slices of different sizes does not compare,
their recall does, and so do two models on one slice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel

from detr.metrics.outcomes import Bools, Ints, Outcomes, mean_precision

_Z = 1.959964  # two-sided 95 % of the normal distribution
_THRESHOLDS = 10


class Slice(BaseModel):
    """One value of what is sliced by.

    Attributes:
        value: In words.
        images: With objects of it; of image slices, all.
        objects: There were to find.
        found: Of them, with a score of at least the analysis's and IoU 0.5.
        ap, ap50: COCO AP; ``None`` without objects.
    """

    value: str
    images: int
    objects: int
    found: int
    ap: float | None
    ap50: float | None

    @property
    def recall(self) -> float | None:
        """Share of the objects that were found."""
        return self.found / self.objects if self.objects else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of :attr:`recall`; see :func:`wilson`."""
        return wilson(self.found, self.objects) if self.objects else None


class Slices(BaseModel):
    """All values of one property.

    Attributes:
        by: Name of the property.
        of: Whether it is of objects or of images.
        rows: In the order of the values.
    """

    by: str
    of: Literal["objects", "images"]
    rows: list[Slice]


@dataclass(frozen=True)
class Slicing:
    """What to slice by.

    Attributes:
        by: Name of the property.
        of: Whether ``values`` are of annotations or of images, in the document's order.
        values: In words; None belongs to no slice.
        order: All values as they are to be shown.
        detections: ``[N]`` value of each detection, where it has one of its own.
    """

    by: str
    of: Literal["objects", "images"]
    values: Sequence[str | None]
    order: Sequence[str]
    detections: Sequence[str] | None = None


def wilson(hits: int, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson, JASA 22, 1927); sound for few objects and at 0 and 1."""
    share, spread = hits / count, _Z * _Z / count
    middle = (share + spread / 2) / (1 + spread)
    reach = _Z * math.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    return max(0.0, middle - reach), min(1.0, middle + reach)


def slice_accuracy(
    slicing: Slicing, document: dict[str, Any], outcomes: Outcomes, score: float
) -> Slices:
    """Accuracy in each slice.

    Args:
        slicing: What to slice by.
        document: COCO ground truth.
        outcomes: What :func:`match_detections` made of it.
        score: From which on an object counts as found.
    """
    assert outcomes.row is not None, "outcomes of match_detections"
    truth = _Truth(document)
    values = np.array([v or "" for v in slicing.values], dtype=object)
    rows = []
    for value in slicing.order:
        chosen = values == value
        alarms: Bools = np.ones(len(outcomes.score), dtype=bool)
        if slicing.of == "images":
            alarms = chosen[outcomes.image]
            images = int(chosen.sum())
            chosen = chosen[truth.image]
        elif slicing.detections is not None:
            alarms = np.array([v == value for v in slicing.detections], dtype=bool)
        members = chosen.astype(bool) & truth.counts
        if slicing.of == "objects":
            images = len(np.unique(truth.image[members]))
        ap, ap50 = _ap(truth.label, members, outcomes, alarms)
        hit = outcomes.row[outcomes.score >= score, 0]
        found = int(members[np.unique(hit[hit >= 0])].sum())
        rows.append(
            Slice(
                value=value,
                images=images,
                objects=int(members.sum()),
                found=found,
                ap=ap,
                ap50=ap50,
            )
        )
    return Slices(by=slicing.by, of=slicing.of, rows=rows)


class _Truth:
    """Annotations of a document as arrays."""

    def __init__(self, document: dict[str, Any]) -> None:
        images = {image["id"]: k for k, image in enumerate(document["images"])}
        classes = {category["id"]: k for k, category in enumerate(document["categories"])}
        entries = document["annotations"]
        self.image: Ints = np.array([images[e["image_id"]] for e in entries], dtype=np.int64)
        self.label: Ints = np.array([classes[e["category_id"]] for e in entries], dtype=np.int64)
        self.counts: Bools = np.array([not e["iscrowd"] for e in entries], dtype=bool)


def _ap(
    labels: Ints, members: Bools, outcomes: Outcomes, alarms: Bools
) -> tuple[float | None, float | None]:
    """Mean over the classes with objects of the slice."""
    assert outcomes.row is not None
    counts = np.append(members, False)  # the last is that of -1
    bits = 1 << np.arange(_THRESHOLDS)
    found: list[tuple[float, float]] = []
    for label in np.unique(labels[members]).tolist():
        positives = int((labels[members] == label).sum())
        own = slice(*np.searchsorted(outcomes.label, [label, label + 1]).tolist())
        rows = outcomes.row[own]
        right = counts[rows]
        # What comes after the last right detection lowers no precision that is looked at.
        last = int(np.flatnonzero(right.any(axis=1))[-1]) + 1 if right.any() else 0
        if not last:
            found.append((0.0, 0.0))
            continue
        ignored = (outcomes.ignored[own][:last, None] & bits) > 0
        wrong = (rows[:last] < 0) & ~ignored & alarms[own][:last, None]
        hits, misses, weight = right[:last].T, wrong.T, np.ones(last, dtype=np.int64)
        found.append(
            (
                mean_precision(hits, misses, weight, positives),
                mean_precision(hits[:1], misses[:1], weight, positives),
            )
        )
    if not found:
        return None, None
    ap, ap50 = np.mean(found, axis=0).tolist()
    return ap, ap50
