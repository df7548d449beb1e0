"""COCO average precision of boxes or masks, computed by faster-coco-eval (a pycocotools in C++).

The protocol is COCO's: 101 recall points, IoU 0.50:0.05:0.95, at most 100 detections of a class per
image unless told otherwise, crowd annotations are regions in which detections are neither right nor
wrong.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

from detr.cli_support import counted
from detr.config import ClassMap
from detr.data.coco_document import coco_ground_truth
from detr.data.dataset import Dataset
from detr.errors import UserError
from detr.types import Detections, ImageId

_AREAS = ("all", "small", "medium", "large")
_IOUS = tuple(round(0.5 + 0.05 * k, 2) for k in range(10))
MAX_DETS = 100

Overlap = Literal["bbox", "segm", "boundary"]
"""Of which IoU is taken: boxes, masks, or masks and the strips along their outlines, whichever is
less (Boundary IoU, Cheng et al. 2021)."""


@dataclass(frozen=True)
class Accuracy:
    """How AP and AR are computed.

    Attributes:
        max_dets: Detections of a class that count in an image, the best ones.
        ious: Overlaps, between 0 and 1, at which AP is told besides.
        overlap: Of boxes or of masks.
    """

    max_dets: int = MAX_DETS
    ious: tuple[float, ...] = ()
    overlap: Overlap = "bbox"


_USUAL = Accuracy()
_KEYS = ("image_id", "category_id", "score")


class ClassAp(BaseModel):
    """Average precision of one class.

    Attributes:
        ap: Over IoU 0.50:0.95, 0..1; ``None`` where the class has no ground truth.
        ap50: At IoU 0.50.
        count: Ground-truth boxes of the class, crowds not counted.
    """

    ap: float | None
    ap50: float | None
    count: int


class CocoAp(BaseModel):
    """Average precision over a data set, every value in 0..1.

    Attributes:
        ap: Mean over classes with ground truth and IoU 0.50:0.95.
        ap50, ap75: At one IoU.
        ap_small, ap_medium, ap_large: Objects below 32 x 32, below 96 x 96 and above (area in
            pixels of the original image as the ground truth tells it, detections' of the box or
            mask that is judged); ``None`` where there is no such object.
        per_class: By class name, in the order of the class list.
        images: Images evaluated.
        n_gt: Ground-truth boxes, crowds not counted.
        ar1, ar10, ar: Average recall over IoU 0.50:0.95 with 1, 10 and ``max_dets`` detections of a
            class per image.
        ar_small, ar_medium, ar_large: ``ar`` by size, as AP.
        at_iou: AP at each overlap asked for, by its text (``0.3``).
        max_dets: Detections of a class that count in an image; 100 in reports that do not tell.
        crowded: Images with more objects of one class than that.
    """

    ap: float
    ap50: float
    ap75: float
    ap_small: float | None
    ap_medium: float | None
    ap_large: float | None
    per_class: dict[str, ClassAp]
    images: int
    n_gt: int
    ar1: float | None = None
    ar10: float | None = None
    ar: float | None = None
    ar_small: float | None = None
    ar_medium: float | None = None
    ar_large: float | None = None
    at_iou: dict[str, float] | None = None
    max_dets: int | None = None
    crowded: int | None = None

    def note(self) -> str:
        """What to know of images with more objects than detections count; empty without such."""
        if not self.crowded:
            return ""
        return (
            f"AP counts the {self.max_dets} best detections of a class in an image, and "
            f"{counted(self.crowded, 'image')} with more objects of one cannot be found whole; "
            "raise it with --max-dets"
        )


def evaluate(
    dataset: Dataset,
    detections: Sequence[Detections],
    indices: Sequence[int] | None = None,
    accuracy: Accuracy = _USUAL,
) -> CocoAp:
    """Average precision of a detector's output on a data set.

    Args:
        dataset: Where the ground truth comes from.
        detections: One per image, labels indexing ``dataset.classes``; ``detections[k]`` belongs to
            image ``indices[k]``.
        indices: Evaluate on these images only; every image by default.
        accuracy: What counts.

    Raises:
        UserError: ``no-ground-truth`` where the images carry no box at all,
            ``detections-not-finite`` where a box or score is NaN or infinite, ``mask-missing`` and
            what else is wrong with the data set's masks where they are asked for.
        ValueError: ``detections`` and ``indices`` differ in length, or one has no masks where they
            are asked for.
    """
    chosen = range(len(dataset)) if indices is None else indices
    if len(chosen) != len(detections):
        raise ValueError(f"{len(detections)} detections for {len(chosen)} images")
    ids = [dataset.image_id(i) for i in chosen]
    truth = coco_ground_truth(dataset, masks=accuracy.overlap != "bbox")
    if indices is not None:
        truth = restrict(truth, ids)
    results: list[dict[str, Any]] = []
    for image_id, found in zip(ids, detections, strict=True):
        results += to_results(image_id, found, dataset.classes)
    return evaluate_json(truth, results, accuracy)


def to_results(image_id: ImageId, found: Detections, classes: ClassMap) -> list[dict[str, Any]]:
    """The detections of one image as entries of a COCO results file (box x y w h in pixels).

    Where there are masks each entry has its own, too, as run lengths.
    """
    xywh = found.boxes.astype(np.float64)
    xywh[:, 2:] -= xywh[:, :2]
    entries: list[dict[str, Any]] = [
        {"image_id": image_id, "category_id": classes.category_ids[label], "bbox": box, "score": s}
        for box, s, label in zip(
            xywh.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True
        )
    ]
    if found.masks is not None:
        for entry, mask in zip(entries, found.masks, strict=True):
            entry["segmentation"] = mask.to_json()
    return entries


def restrict(ground_truth: dict[str, Any], image_ids: Sequence[ImageId]) -> dict[str, Any]:
    """The same ground truth with only the given images and their annotations."""
    keep = set(image_ids)
    return {
        **ground_truth,
        "images": [image for image in ground_truth["images"] if image["id"] in keep],
        "annotations": [a for a in ground_truth["annotations"] if a["image_id"] in keep],
    }


def evaluate_json(
    ground_truth: dict[str, Any],
    results: list[dict[str, Any]],
    accuracy: Accuracy = _USUAL,
) -> CocoAp:
    """Average precision of COCO results against COCO ground truth.

    Args:
        ground_truth: ``images``, ``annotations`` and ``categories`` as in an ``instances_*.json``.
        results: Entries with ``image_id``, ``category_id``, ``score`` and what is judged: ``bbox``
            (x y w h), or ``segmentation`` (run lengths). Left unchanged.
        accuracy: What counts.

    Raises:
        UserError: See :func:`evaluate`.
        ValueError: An entry has no mask where they are asked for.
    """
    # Imported here: the evaluator's extension module costs a quarter second at every start.
    from faster_coco_eval import COCO, COCOeval_faster

    counts = dict.fromkeys((c["id"] for c in ground_truth["categories"]), 0)
    for annotation in ground_truth["annotations"]:
        if not annotation.get("iscrowd", 0):
            counts[annotation["category_id"]] += 1
    if not any(counts.values()):
        raise UserError(
            "no-ground-truth",
            f"the {len(ground_truth['images'])} images to evaluate on have no labeled object: "
            "average precision is undefined",
        )
    kept = _KEYS + ("bbox" if accuracy.overlap == "bbox" else "segmentation",)
    if missing := [number for number, entry in enumerate(results) if kept[-1] not in entry]:
        raise ValueError(f"detection {missing[0]} has no {kept[-1]}")
    _check_finite(results)

    truth = COCO(_numbered(ground_truth), print_function=_quiet)
    number = _numbers(ground_truth)
    # Of masks with boxes the evaluator would take the box's area for the mask's.
    found = truth.loadRes(
        [{**{key: r[key] for key in kept}, "image_id": number[r["image_id"]]} for r in results]
    )
    # The evaluator's default calls 32^2 the lower end of "small"; pycocotools starts at 0.
    ranges = {"small": [0, 32**2], "medium": [32**2, 96**2], "large": [96**2, 1e5**2]}
    evaluation = COCOeval_faster(
        truth, found, iouType=accuracy.overlap, ranges=ranges, print_function=_quiet
    )
    every = sorted({*_IOUS, *accuracy.ious})
    evaluation.params.iouThrs = np.array(every)
    evaluation.params.maxDets = sorted({1, min(10, accuracy.max_dets), accuracy.max_dets})
    evaluation.evaluate()
    evaluation.accumulate()

    # [IoU, recall, class, area, detections per image]; -1 marks "no ground truth".
    whole = np.asarray(evaluation.eval["precision"])[..., -1]
    usual = [every.index(iou) for iou in _IOUS]
    precision = whole[usual]
    recall = np.asarray(evaluation.eval["recall"])[usual]
    limits = list(evaluation.params.maxDets)
    names = {c["id"]: c["name"] for c in ground_truth["categories"]}
    return CocoAp(
        ap=_required(precision[..., 0]),
        ap50=_required(precision[0, ..., 0]),
        ap75=_required(precision[5, ..., 0]),
        ap_small=_mean(precision[..., _AREAS.index("small")]),
        ap_medium=_mean(precision[..., _AREAS.index("medium")]),
        ap_large=_mean(precision[..., _AREAS.index("large")]),
        per_class={
            names[c]: ClassAp(
                ap=_mean(precision[:, :, k, 0]), ap50=_mean(precision[0, :, k, 0]), count=counts[c]
            )
            for k, c in enumerate(evaluation.params.catIds)
        },
        images=len(ground_truth["images"]),
        n_gt=sum(counts.values()),
        ar1=_mean(recall[:, :, 0, limits.index(1)]),
        ar10=_mean(recall[:, :, 0, limits.index(10)]) if accuracy.max_dets >= 10 else None,
        ar=_mean(recall[:, :, 0, -1]),
        ar_small=_mean(recall[:, :, _AREAS.index("small"), -1]),
        ar_medium=_mean(recall[:, :, _AREAS.index("medium"), -1]),
        ar_large=_mean(recall[:, :, _AREAS.index("large"), -1]),
        at_iou={f"{iou:g}": _required(whole[every.index(iou), ..., 0]) for iou in accuracy.ious},
        max_dets=accuracy.max_dets,
        crowded=_crowded(ground_truth, accuracy.max_dets),
    )


def _crowded(ground_truth: dict[str, Any], most: int) -> int:
    """Images with more than ``most`` objects of one class."""
    objects = Counter(
        (a["image_id"], a["category_id"])
        for a in ground_truth["annotations"]
        if not a.get("iscrowd", 0)
    )
    return len({image for (image, _), count in objects.items() if count > most})


def _numbers(ground_truth: dict[str, Any]) -> dict[ImageId, int]:
    """A number for each image id: the evaluator knows no text.

    In sorted order, as the evaluator goes through the images: it decides between equal scores.
    """
    ids: list[ImageId] = [image["id"] for image in ground_truth["images"]]
    if not any(isinstance(i, str) for i in ids):
        return {i: int(i) for i in ids}
    ordered = sorted(ids, key=lambda i: (isinstance(i, str), i))
    return {i: number for number, i in enumerate(ordered, start=1)}


def _numbered(ground_truth: dict[str, Any]) -> dict[str, Any]:
    """A copy for the evaluator, which writes into annotations and results."""
    number = _numbers(ground_truth)
    return {
        "images": [{**row, "id": number[row["id"]]} for row in ground_truth["images"]],
        "annotations": [
            {**row, "image_id": number[row["image_id"]]} for row in ground_truth["annotations"]
        ],
        "categories": ground_truth["categories"],
    }


def _mean(precision: npt.NDArray[np.float64]) -> float | None:
    valid = precision[precision > -1]
    return float(valid.mean()) if valid.size else None


def _required(precision: npt.NDArray[np.float64]) -> float:
    value = _mean(precision)
    assert value is not None, "checked before: there is ground truth"
    return value


def _check_finite(results: list[dict[str, Any]]) -> None:
    for number, entry in enumerate(results):
        box = entry.get("bbox", ())
        if not all(map(math.isfinite, (*box, entry["score"]))):
            raise UserError(
                "detections-not-finite",
                f"detection {number} (image {entry['image_id']}) has box {list(box)} and score "
                f"{entry['score']}: a NaN or infinity cannot be ranked",
            )


def _quiet(*_: object) -> None:
    """The evaluator's print function: a library does not talk."""


# The evaluator also warns through logging about annotation ids; ours start at 1.
logging.getLogger("faster_coco_eval").setLevel(logging.ERROR)
