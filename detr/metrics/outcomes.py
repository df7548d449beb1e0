"""Which detections were right, image by image: what a test between two models needs.

AP is no mean over images, so its spread cannot be read off a report. With the outcome of every
detection at hand, AP can be computed for any resampling of the images, and two models can be
compared on the same resamplings (paired bootstrap: Efron and Tibshirani, An Introduction to the
Bootstrap, 1993; for system comparison Koehn, EMNLP 2004).

The matching is COCO's (IoU 0.50:0.05:0.95, crowds are regions in which nothing is wrong, 100
detections per image and class), and the AP it gives is :mod:`detr.metrics.coco_ap`'s.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from detr.errors import UserError
from detr.metrics.coco_ap import MAX_DETS
from detr.types import Detections, ImageId

MATCHES = "matches.npz"

_THRESHOLDS = np.arange(10) * 0.05 + 0.5
_RECALLS = np.linspace(0.0, 1.0, 101)
_BITS = 1 << np.arange(10)

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Outcomes:
    """The detections of one model, best first within each class.

    Attributes:
        image: ``[N]`` position of the image.
        label: ``[N]`` class index.
        score: ``[N]``.
        right: ``[N]`` bit ``k`` is set where it finds a box at IoU 0.50 + 0.05 k.
        ignored: ``[N]`` bit ``k`` is set where it counts neither way.
        area: ``[N]`` of the detection's box, square pixels; None in outcomes read from a file.
        row: ``[N, 10]`` the annotation it finds at each IoU, by its place in the document, -1 where
            none; None likewise.
    """

    image: Ints
    label: Ints
    score: Floats
    right: Ints
    ignored: Ints
    area: Floats | None = None
    row: Ints | None = None


@dataclass(frozen=True)
class GroundTruth:
    """What there was to find.

    Attributes:
        positives: ``[images, classes]`` boxes that count.
        fingerprint: Hash of the images and their boxes: two reports with the same one speak of the
            same ground truth, wherever it lay.
    """

    positives: Ints
    fingerprint: str

    @classmethod
    def of(cls, document: dict[str, Any]) -> GroundTruth:
        """Counts a COCO document's boxes by image and class, in the order of its lists."""
        images = {image["id"]: k for k, image in enumerate(document["images"])}
        classes = {category["id"]: k for k, category in enumerate(document["categories"])}
        positives = np.zeros((len(images), len(classes)), dtype=np.int64)
        digest = hashlib.sha256(repr([*images, *classes]).encode())
        for entry in document["annotations"]:
            position = images[entry["image_id"]], classes[entry["category_id"]]
            positives[position] += not entry["iscrowd"]
            digest.update(repr((position, entry["bbox"], entry["iscrowd"])).encode())
        return cls(positives, digest.hexdigest())


def match_detections(
    ground_truth: dict[str, Any], detections: Sequence[Detections], most: int = MAX_DETS
) -> Outcomes:
    """Matches detections with a COCO document's boxes.

    Args:
        ground_truth: ``images``, ``annotations`` and ``categories``.
        detections: One per image, in their order; labels are positions among the categories.
        most: Detections of a class that count in an image, the best ones.
    """
    boxes: dict[tuple[ImageId, int], list[_Truth]] = defaultdict(list)
    for place, entry in enumerate(ground_truth["annotations"]):
        boxes[entry["image_id"], entry["category_id"]].append(
            (entry["bbox"], bool(entry["iscrowd"]), place)
        )
    ids = [category["id"] for category in ground_truth["categories"]]
    parts: list[tuple[Ints, ...]] = []
    scores: list[Floats] = []
    areas: list[Floats] = []
    for position, (image, found) in enumerate(zip(ground_truth["images"], detections, strict=True)):
        for label in np.unique(found.labels).tolist():
            own = found.labels == label
            order = np.argsort(-found.scores[own], kind="stable")[:most]
            best = found.boxes[own][order].astype(np.float64)
            area = (best[:, 2] - best[:, 0]) * (best[:, 3] - best[:, 1])
            right, ignored, row = _match(best, boxes.get((image["id"], ids[label]), []))
            # Outside of all of COCO's ranges of area, and so no false detection.
            ignored = np.where(area < 0, _BITS.sum() & ~right, ignored)
            parts.append(
                (np.full(len(order), position), np.full(len(order), label), right, ignored, row)
            )
            scores.append(found.scores[own][order].astype(np.float64))
            areas.append(area)
    if not parts:
        none = np.zeros(0, dtype=np.int64)
        return Outcomes(
            none, none, none.astype(np.float64), none, none, none.astype(np.float64),
            none.reshape(0, len(_BITS)),
        )  # fmt: skip
    score = np.concatenate(scores)
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    order = np.lexsort((-score, columns[1]))  # stable: equal scores stay in order of the images
    places, labels, right, ignored, row = (column[order] for column in columns)
    area = np.concatenate(areas)[order]
    return Outcomes(places, labels, score[order], right, ignored, area, row)


# Box (x y w h), whether it is a crowd, place in the document.
_Truth = tuple[list[float], bool, int]


def _match(found: Floats, truth: Sequence[_Truth]) -> tuple[Ints, Ints, Ints]:
    """Gives each detection, best first, the free box it overlaps most, at every threshold."""
    right, ignored = np.zeros((2, len(found)), dtype=np.int64)
    row = np.full((len(found), len(_BITS)), -1, dtype=np.int64)
    if not truth:
        return right, ignored, row
    # Boxes that count come first, and only what overlaps none of them may fall into a crowd.
    ordered = sorted(truth, key=lambda entry: entry[1])
    crowd = np.array([entry[1] for entry in ordered])
    iou = box_overlap(found, np.array([entry[0] for entry in ordered], dtype=np.float64), crowd)
    places = np.array([entry[2] for entry in ordered])[~crowd]
    limits = np.minimum(_THRESHOLDS, 1 - 1e-10)[:, None]
    free: Bools = np.ones((len(limits), int((~crowd).sum())), dtype=bool)
    for d in range(len(found)):
        near = np.where(free & (iou[d, ~crowd] >= limits), iou[d, ~crowd], -1.0)
        if near.size:
            # COCO's loop keeps the last of equal overlaps.
            best = near.shape[1] - 1 - np.argmax(near[:, ::-1], axis=1)
            hit = np.take_along_axis(near, best[:, None], axis=1)[:, 0] >= 0
            free[hit, best[hit]] = False
            row[d, hit] = places[best[hit]]
        else:
            hit = np.zeros(len(limits), dtype=bool)
        in_crowd = (iou[d, crowd] >= limits).any(axis=1)
        right[d] = int(_BITS[hit].sum())
        ignored[d] = int(_BITS[~hit & in_crowd].sum())
    return right, ignored, row


def box_overlap(found: Floats, truth: Floats, crowd: Bools) -> Floats:
    """``[D, G]``; a crowd's overlap is the share of the detection that lies inside it."""
    x0, y0, x1, y1 = (found[:, None, k] for k in range(4))
    tx, ty, tw, th = (truth[None, :, k] for k in range(4))
    width = np.minimum(x1, tx + tw) - np.maximum(x0, tx)
    height = np.minimum(y1, ty + th) - np.maximum(y0, ty)
    common = np.clip(width, 0, None) * np.clip(height, 0, None)
    area = (x1 - x0) * (y1 - y0)
    union = np.where(crowd[None], area, area + tw * th - common)
    overlap: Floats = common / np.where(union > 0, union, 1.0)
    return overlap


def average_precision(
    outcomes: Outcomes, truth: GroundTruth, weights: Ints | None = None
) -> Floats:
    """COCO AP where image ``i`` occurs ``weights[r, i]`` times.

    Args:
        outcomes: Of one model.
        truth: What there was to find.
        weights: ``[R, images]``; every image once by default.

    Returns:
        ``[R]``, 0..1; NaN where a resampling holds no box at all.
    """
    if weights is None:
        weights = np.ones((1, len(truth.positives)), dtype=np.int64)
    total = np.zeros(len(weights))
    counted = np.zeros(len(weights))
    for label in range(truth.positives.shape[1]):
        positives = weights @ truth.positives[:, label]
        own = outcomes.label == label
        right = (outcomes.right[own][:, None] & _BITS) > 0
        # What comes after the last right detection lowers no precision that is looked at.
        last = int(np.flatnonzero(right.any(axis=1))[-1]) + 1 if right.any() else 0
        right = right[:last].T
        wrong = ~right & ~((outcomes.ignored[own][:last][:, None] & _BITS) > 0).T
        image = outcomes.image[own][:last]
        for r in np.flatnonzero(positives):
            counted[r] += 1
            if last:
                total[r] += mean_precision(right, wrong, weights[r, image], int(positives[r]))
    with np.errstate(invalid="ignore"):
        return total / counted


def mean_precision(right: Bools, wrong: Bools, weight: Ints, positives: int) -> float:
    """Mean over thresholds and 101 recalls of the interpolated precision of one class.

    Args:
        right: ``[thresholds, N]`` of detections, best first.
        wrong: Likewise.
        weight: ``[N]`` how often each counts.
        positives: Objects there are.
    """
    return float(interpolated_precision(right, wrong, weight, positives).mean())


def interpolated_precision(right: Bools, wrong: Bools, weight: Ints, positives: int) -> Floats:
    """``[thresholds, 101]`` best precision at each recall or a higher one; see above."""
    hits = np.cumsum(right * weight, axis=1)
    misses = np.cumsum(wrong * weight, axis=1)
    precision = hits / np.maximum(hits + misses, np.spacing(1))
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    recall = hits / positives
    curves = np.zeros((len(recall), len(_RECALLS)))
    for k in range(len(recall)):
        at = np.searchsorted(recall[k], _RECALLS, side="left")
        reached = at < envelope.shape[1]
        curves[k, reached] = envelope[k][at[reached]]
    return curves


def precision_curves(outcomes: Outcomes, truth: GroundTruth, threshold: int = 0) -> list[Floats]:
    """Precision at 101 recalls of each class, at IoU 0.50 + 0.05 ``threshold``.

    Args:
        outcomes: Of one model.
        truth: What there was to find.
        threshold: Which IoU.

    Returns:
        One array per class, empty where it has no object.
    """
    bit = 1 << threshold
    curves = []
    for label, positives in enumerate(truth.positives.sum(axis=0).tolist()):
        own = outcomes.label == label
        right, ignored = ((x[own] & bit) > 0 for x in (outcomes.right, outcomes.ignored))
        curve = np.zeros(len(_RECALLS))
        if own.any() and positives:
            weight = np.ones(int(own.sum()), dtype=np.int64)
            wrong = ~right & ~ignored
            curve = interpolated_precision(right[None], wrong[None], weight, positives)[0]
        curves.append(curve if positives else np.zeros(0))
    return curves


def pack(truth: GroundTruth, models: dict[str, Outcomes]) -> bytes:
    """The content of a ``matches.npz``."""
    arrays: dict[str, Any] = {
        "positives": truth.positives, "fingerprint": np.array(truth.fingerprint),
        "names": np.array(list(models)),
    }  # fmt: skip
    for k, m in enumerate(models.values()):
        arrays |= {
            f"image_{k}": m.image.astype(np.int32),
            f"label_{k}": m.label.astype(np.int16),
            f"score_{k}": m.score.astype(np.float32),
            f"right_{k}": m.right.astype(np.int16),
            f"ignored_{k}": m.ignored.astype(np.int16),
        }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def unpack(path: Path | io.BytesIO) -> tuple[GroundTruth, dict[str, Outcomes]]:
    """Reads a ``matches.npz`` back, from its path or its content.

    Raises:
        UserError: ``matches-unreadable``.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            truth = GroundTruth(arrays["positives"], str(arrays["fingerprint"]))
            models = {
                str(name): Outcomes(
                    arrays[f"image_{k}"].astype(np.int64),
                    arrays[f"label_{k}"].astype(np.int64),
                    arrays[f"score_{k}"].astype(np.float64),
                    arrays[f"right_{k}"].astype(np.int64),
                    arrays[f"ignored_{k}"].astype(np.int64),
                )
                for k, name in enumerate(arrays["names"])
            }
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(
            "matches-unreadable", f"{path}: {error}; measure again with bench run --out"
        ) from error
    return truth, models
