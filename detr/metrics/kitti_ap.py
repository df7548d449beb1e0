"""KITTI 2-D average precision, step for step as the benchmark's offline evaluation does it.

Geiger et al., "Are we ready for Autonomous Driving?", CVPR 2012; 40 points after Simonelli et al.,
"Disentangling Monocular 3D Object Detection", ICCV 2019. It is not COCO AP:

* Ground truth harder than the difficulty asks for, and classes that are easily confused with the
  one evaluated (Van for Car, Person_sitting for Pedestrian), are neither hits nor misses.
* A detection lower than the minimum height, or lying in a ``DontCare`` region, is no false
  positive. As in the offline evaluation that holds for a small detection of *any* class, which may
  even take a ground-truth box, and heights of detections are cut to whole pixels first.
* Recall is sampled at 41 scores, chosen so that each adds 1/40 of recall. Precision at each is
  made from a fresh assignment in which a ground-truth box takes the detection overlapping it most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

from detr.data.kitti_rows import KittiLabels, KittiObject

OFFICIAL_CLASSES = ("Car", "Pedestrian", "Cyclist")

# The protocol samples precision at 41 hits, so that with fewer boxes even a perfect detector stays
# below 1; whoever shows such a figure marks it.
MEANINGFUL_COUNT = 41

_NEIGHBOR = {"car": "van", "pedestrian": "person_sitting"}
_SAMPLES = MEANINGFUL_COUNT

_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]
_Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class _Difficulty:
    """Limits on the objects that count; heights in pixels."""

    min_height: int
    max_occlusion: int
    max_truncation: float


_DIFFICULTIES = {
    "easy": _Difficulty(40, 0, 0.15),
    "moderate": _Difficulty(25, 1, 0.30),
    "hard": _Difficulty(25, 2, 0.50),
}


class KittiLevel(BaseModel):
    """One class at one difficulty.

    Attributes:
        ap11: 11-point average precision, 0..1; ``None`` without ground truth.
        ap40: 40-point average precision (the leaderboard's since 2019).
        count: Ground-truth boxes that count; below :data:`MEANINGFUL_COUNT` the figures are those
            of the protocol but cannot reach 1.
    """

    ap11: float | None
    ap40: float | None
    count: int

    @property
    def mark(self) -> str:
        """A dagger where there are too few boxes for the figures to mean much."""
        return "†" if 0 < self.count < MEANINGFUL_COUNT else ""


class KittiClassAp(BaseModel):
    """One class at the three difficulties, overlap in IoU above which a detection is a hit."""

    overlap: float
    easy: KittiLevel
    moderate: KittiLevel
    hard: KittiLevel


class KittiAp(BaseModel):
    """KITTI AP by class name; ``images`` is the number of images evaluated."""

    per_class: dict[str, KittiClassAp]
    images: int

    def note(self) -> str:
        """Explains the daggers, if there are any."""
        levels = [v for c in self.per_class.values() for v in (c.easy, c.moderate, c.hard)]
        if not any(level.mark for level in levels):
            return ""
        return (
            f"† fewer than {MEANINGFUL_COUNT} boxes: the protocol cannot give such a class 100, "
            "whatever is detected"
        )


@dataclass
class _Image:
    """One image, reduced to what matters for one class.

    Attributes:
        neighbor: ``[G]`` ground truth is of the class easily confused with the evaluated one.
        height, occlusion, truncation: ``[G]`` of the ground truth.
        same: ``[D]`` detection is of the evaluated class.
        det_height: ``[D]`` whole pixels.
        scores: ``[D]``.
        in_dont_care: ``[D]`` lies in a ``DontCare`` region.
        candidates: Per ground truth, (detection, IoU) of those above the overlap, in file order.
    """

    neighbor: _Bools
    height: _Floats
    occlusion: _Floats
    truncation: _Floats
    same: _Bools
    det_height: _Ints
    scores: _Floats
    in_dont_care: _Bools
    candidates: list[list[tuple[int, float]]]


def evaluable(labels: KittiLabels) -> list[str]:
    """The benchmark's classes that mean in a data set what they mean in the benchmark.

    A class into which others were merged does not, but for the one that counts neither way.
    """
    found = []
    for name in OFFICIAL_CLASSES:
        allowed = {name.lower(), _NEIGHBOR.get(name.lower())}
        sources = labels.sources(name)
        if name in sources and all(source.lower() in allowed for source in sources):
            found.append(name)
    return found


def evaluate(
    objects_per_image: Sequence[Sequence[KittiObject]],
    detections_per_image: Sequence[Sequence[KittiObject]],
    classes: Sequence[str] = OFFICIAL_CLASSES,
) -> KittiAp:
    """KITTI AP of detections against label files.

    Args:
        objects_per_image: All label rows of each image, ``DontCare`` and other classes included.
        detections_per_image: Detections with a score, all classes together; same order of images.
        classes: Class names to evaluate, compared without case.

    Raises:
        ValueError: The two sequences differ in length.
    """
    if len(objects_per_image) != len(detections_per_image):
        raise ValueError(
            f"{len(detections_per_image)} images of detections for {len(objects_per_image)} images"
        )
    per_class = {}
    for name in classes:
        overlap = 0.7 if name.lower() == "car" else 0.5
        images = [
            _reduce(objects, found, name.lower(), overlap)
            for objects, found in zip(objects_per_image, detections_per_image, strict=True)
        ]
        levels = {level: _evaluate(images, limits) for level, limits in _DIFFICULTIES.items()}
        per_class[name] = KittiClassAp(overlap=overlap, **levels)
    return KittiAp(per_class=per_class, images=len(objects_per_image))


def _reduce(
    objects: Sequence[KittiObject], found: Sequence[KittiObject], name: str, min_overlap: float
) -> _Image:
    neighbor_name = _NEIGHBOR.get(name)
    truth = [o for o in objects if o.type.lower() in (name, neighbor_name)]
    # A detection of another class takes part only where it may be too low to count.
    smallest = max(limits.min_height for limits in _DIFFICULTIES.values())
    candidates = [
        d for d in found
        if d.type.lower() == name or int(abs(d.box[3] - d.box[1])) < smallest
    ]  # fmt: skip
    boxes, det_boxes = _boxes(truth), _boxes(candidates)
    dont_care = _boxes([o for o in objects if o.type.lower() == "dontcare"])
    shared = _intersection(det_boxes, dont_care)
    overlaps = _iou(boxes, det_boxes)
    return _Image(
        neighbor=np.array([o.type.lower() != name for o in truth], dtype=bool),
        height=boxes[:, 3] - boxes[:, 1],
        occlusion=np.array([o.occluded for o in truth], dtype=np.float64),
        truncation=np.array([o.truncated for o in truth], dtype=np.float64),
        same=np.array([d.type.lower() == name for d in candidates], dtype=bool),
        det_height=np.abs(det_boxes[:, 3] - det_boxes[:, 1]).astype(np.int64),
        scores=np.array([_score(d) for d in candidates], dtype=np.float64),
        in_dont_care=np.any(shared > min_overlap * _area(det_boxes)[:, None], axis=1),
        candidates=[
            [(int(d), float(row[d])) for d in np.flatnonzero(row > min_overlap)] for row in overlaps
        ],
    )


def _evaluate(images: Sequence[_Image], limits: _Difficulty) -> KittiLevel:
    """Precision at the sampled scores, and its mean over 11 and 40 recalls."""
    count = 0
    hit_scores: list[float] = []
    for image in images:
        counts = _counts(image, limits)
        count += int(counts.sum())
        hit_scores += _hit_scores(image, counts, limits)
    if count == 0:
        return KittiLevel(ap11=None, ap40=None, count=0)
    thresholds = sample_thresholds(np.array(hit_scores), count)

    hits = np.zeros(len(thresholds))
    false = np.zeros(len(thresholds))
    for image in images:
        image_hits, image_false = _assign(image, _counts(image, limits), limits, thresholds)
        hits += image_hits
        false += image_false
    precision = np.zeros(_SAMPLES)
    precision[: len(thresholds)] = hits / np.maximum(hits + false, 1)
    # Interpolated: the best precision at this recall or a higher one.
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    return KittiLevel(
        ap11=float(precision[::4].mean()), ap40=float(precision[1:].mean()), count=count
    )


def _counts(image: _Image, limits: _Difficulty) -> _Bools:
    """``[G]`` ground truth that must be found at this difficulty; the rest is ignored."""
    return (
        ~image.neighbor
        & (image.occlusion <= limits.max_occlusion)
        & (image.truncation <= limits.max_truncation)
        & (image.height >= limits.min_height)
    )


def _hit_scores(image: _Image, counts: _Bools, limits: _Difficulty) -> list[float]:
    """Scores of the hits where each ground-truth box takes its best-scored detection."""
    low = image.det_height < limits.min_height
    taken = np.zeros(len(image.scores), dtype=bool)
    hits = []
    for g, candidates in enumerate(image.candidates):
        free = [d for d, _ in candidates if not taken[d] and (image.same[d] or low[d])]
        if not free:
            continue
        best = max(free, key=lambda d: image.scores[d])
        taken[best] = True
        if counts[g] and not low[best]:
            hits.append(float(image.scores[best]))
    return hits


def sample_thresholds(scores: _Floats, count: int) -> _Floats:
    """At most 41 of the hit scores, descending, the k-th nearest to a recall of k / 40.

    Args:
        scores: ``[H]`` scores of the hits, any order.
        count: Ground-truth boxes, at least H.
    """
    ordered = np.sort(scores)[::-1]
    chosen = []
    recall = 0.0
    for i, score in enumerate(ordered):
        here = (i + 1) / count
        last = i == len(ordered) - 1
        following = here if last else (i + 2) / count
        if not last and following - recall < recall - here:
            continue
        chosen.append(score)
        recall += 1 / (_SAMPLES - 1)
    return np.array(chosen)


def _assign(
    image: _Image, counts: _Bools, limits: _Difficulty, thresholds: _Floats
) -> tuple[_Ints, _Ints]:
    """Hits and false positives of one image at each threshold, both ``[T]``.

    Only detections scored at or above a threshold take part; all thresholds are worked on at once.
    """
    low = image.det_height < limits.min_height
    present = image.scores[:, None] >= thresholds  # [D, T]
    taken = np.zeros_like(present)
    hits = np.zeros(len(thresholds), dtype=np.int64)
    for g, candidates in enumerate(image.candidates):
        best = np.full(len(thresholds), -1)  # [T] the detection this box takes
        overlap = np.zeros(len(thresholds))
        only_low = np.zeros(len(thresholds), dtype=bool)
        for d, value in candidates:
            free = present[d] & ~taken[d]
            if low[d]:
                # Too low to count: stands in where the box has nothing yet.
                better = free & (best < 0)
                only_low |= better
            elif image.same[d]:
                better = free & ((value > overlap) | only_low)
                overlap[better] = value
                only_low &= ~better
            else:
                continue
            best[better] = d
        found = np.flatnonzero(best >= 0)
        taken[best[found], found] = True
        if counts[g]:
            hits[found] += ~low[best[found]]
    may_be_false = image.same & ~low & ~image.in_dont_care
    false = (present & ~taken)[may_be_false].sum(axis=0)
    return hits, false


def _score(detection: KittiObject) -> float:
    if detection.score is None:
        raise ValueError("a detection without a score")
    return detection.score


def _boxes(objects: Sequence[KittiObject]) -> _Floats:
    return np.array([o.box for o in objects], dtype=np.float64).reshape(-1, 4)


def _area(boxes: _Floats) -> _Floats:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _intersection(a: _Floats, b: _Floats) -> _Floats:
    """``[A, B]`` shared area of boxes x0 y0 x1 y1."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    sides: _Floats = np.clip(high - low, 0, None)
    return sides[..., 0] * sides[..., 1]


def _iou(a: _Floats, b: _Floats) -> _Floats:
    shared = _intersection(a, b)
    union = _area(a)[:, None] + _area(b)[None, :] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
