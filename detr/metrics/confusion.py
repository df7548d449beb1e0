"""What was taken for what: a confusion matrix with "nothing" on both sides, and the mistakes in it.

Detections of a score or more are matched at one IoU, best first: with objects of their own class,
and what is left with objects of any class. An object left over is missed, a detection left over a
false alarm, unless it lies in a region in which nothing is wrong.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from pydantic import BaseModel

from detr.metrics.outcomes import Bools, Floats, Ints, box_overlap
from detr.types import Detections, ImageId

Kind = Literal["wrong class", "false alarm", "duplicate", "missed"]


class Confusion(BaseModel):
    """Objects by what they are and what they were taken for.

    Attributes:
        names: Classes.
        counts: ``[classes + 1][classes + 1]``; the last row is nothing (false alarms), the last
            column is nothing found (missed).
    """

    names: list[str]
    counts: list[list[int]]


@dataclass(frozen=True)
class Mistake:
    """One thing that was wrong.

    Attributes:
        kind: What is wrong; a duplicate is a false alarm upon an object that was found already.
        image: Position of the image.
        box: x0 y0 x1 y1 of the detection, or of the missed object.
        truth: Class index of the object, -1 without one.
        found: Class index of the detection, -1 without one.
        weight: What makes it bad: the score, of a missed object its area in square pixels.
    """

    kind: Kind
    image: int
    box: tuple[float, float, float, float]
    truth: int
    found: int
    weight: float


def confusion(
    document: dict[str, Any], detections: Sequence[Detections], score: float, iou: float = 0.5
) -> tuple[Confusion, list[Mistake]]:
    """Counts confusions and lists every mistake, in the order of the images.

    Args:
        document: COCO ground truth.
        detections: One per image, in its order; labels are positions among the categories.
        score: Detections below are not looked at.
        iou: Least overlap of a detection with what it finds.
    """
    classes = {category["id"]: k for k, category in enumerate(document["categories"])}
    truth: dict[ImageId, list[tuple[list[float], int, bool]]] = defaultdict(list)
    for e in document["annotations"]:
        truth[e["image_id"]].append((e["bbox"], classes[e["category_id"]], bool(e["iscrowd"])))
    nothing = len(classes)
    counts = np.zeros((nothing + 1, nothing + 1), dtype=np.int64)
    mistakes: list[Mistake] = []
    for position, (image, found) in enumerate(zip(document["images"], detections, strict=True)):
        entries = sorted(truth[image["id"]], key=lambda entry: entry[2])
        boxes = np.array([entry[0] for entry in entries], dtype=np.float64).reshape(-1, 4)
        labels = np.array([entry[1] for entry in entries], dtype=np.int64)
        crowd = np.array([entry[2] for entry in entries], dtype=bool)
        seen = found.above(score)
        places = seen.boxes.astype(np.float64)
        overlap = box_overlap(places, boxes, crowd)
        partner = _match(overlap[:, ~crowd], seen.labels, labels[~crowd], iou)
        inside = (overlap >= iou) & crowd & (labels == seen.labels[:, None])
        excused = inside.any(axis=1)
        for d, one in enumerate(partner.tolist()):
            label = int(seen.labels[d])
            if one < 0 and excused[d]:
                continue
            what = nothing if one < 0 else int(labels[one])
            counts[what, label] += 1
            if what != label:
                kind: Kind = "wrong class"
                if one < 0:
                    twice = bool((overlap[d, ~crowd] >= iou).any())
                    kind = "duplicate" if twice else "false alarm"
                truth_label = -1 if one < 0 else what
                box = _box(places[d])
                mistakes.append(
                    Mistake(kind, position, box, truth_label, label, float(seen.scores[d]))
                )
        taken = set(partner.tolist())
        for g in range(int((~crowd).sum())):
            if g not in taken:
                counts[labels[g], nothing] += 1
                x, y, w, h = boxes[g].tolist()
                mistakes.append(
                    Mistake("missed", position, (x, y, x + w, y + h), int(labels[g]), -1, w * h)
                )
    names = [category["name"] for category in document["categories"]]
    return Confusion(names=names, counts=counts.tolist()), mistakes


def worst(mistakes: Sequence[Mistake], each: int) -> list[Mistake]:
    """The worst of each kind: the surest detections, the largest missed objects."""
    found: list[Mistake] = []
    for kind in get_args(Kind):
        own = [mistake for mistake in mistakes if mistake.kind == kind]
        found += sorted(own, key=lambda mistake: -mistake.weight)[:each]
    return found


def _match(overlap: Floats, found: Ints, truth: Ints, iou: float) -> Ints:
    """``[D]`` object of each detection, best first: of its own class, else of any; -1 for none."""
    partner = np.full(len(found), -1, dtype=np.int64)
    free: Bools = np.ones(len(truth), dtype=bool)
    for own_class in (True, False):
        for d in np.flatnonzero(partner < 0).tolist():
            fits = free & (overlap[d] >= iou)
            if own_class:
                fits &= truth == found[d]
            if fits.any():
                partner[d] = int(np.argmax(np.where(fits, overlap[d], -1.0)))
                free[partner[d]] = False
    return partner


def _box(corners: Floats) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = corners.tolist()
    return x0, y0, x1, y1
