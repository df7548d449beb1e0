"""Average precision of anyone's detections; needs labels, no images and no model.

Detections are a COCO results file or a folder of KITTI result files (``FRAME.txt``, 16 columns).
Either can be scored by either protocol, as far as the data set knows what the protocol needs.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from bench.report.model import percent
from detr.cli_support import progress
from detr.data import inspect
from detr.data.coco_document import coco_ground_truth
from detr.data.dataset import Dataset
from detr.data.kitti_rows import KittiLabels, KittiObject, read_label_file
from detr.errors import UserError
from detr.files import TEXT
from detr.metrics import coco_ap, kitti_ap
from detr.metrics.coco_ap import Accuracy, CocoAp
from detr.metrics.kitti_ap import KittiAp
from detr.types import is_image_id

Protocol = Literal["coco", "kitti"]


class Score(BaseModel):
    """What ``bench score`` found.

    Attributes:
        detections: Path as given.
        data: Data set as given.
        protocol: Which of the two fields is filled.
        notes: What was left out of the labels.
    """

    detections: str
    data: str
    protocol: Protocol
    coco: CocoAp | None = None
    kitti: KittiAp | None = None
    notes: list[str] = []

    def text(self) -> str:
        """A table for the terminal."""
        if self.coco is not None:
            table = coco_text(self.coco)
        else:
            assert self.kitti is not None
            table = kitti_text(self.kitti)
        return "\n".join([table, *self.notes])


def score(
    detections: Path,
    dataset: Dataset,
    protocol: Protocol | None = None,
    accuracy: Accuracy | None = None,
) -> Score:
    """Scores a results file or folder.

    Args:
        detections: A COCO results file, or a folder of KITTI result files.
        dataset: The ground truth.
        protocol: By default KITTI's for KITTI result files of a KITTI data set, else COCO's.
        accuracy: How COCO AP is computed.

    Raises:
        UserError: ``detections-missing``, ``detections-unreadable``, ``detections-entry``,
            ``detections-class``, ``detections-image``, ``protocol-data``, ``no-ground-truth``.
    """
    if not detections.exists():
        raise UserError("detections-missing", f"{detections}: no such file or folder")
    folder = detections.is_dir()
    chosen: Protocol = protocol or ("kitti" if folder and dataset.protocols.kitti else "coco")
    findings = inspect(dataset, pictures=False)
    findings.stop()
    result = Score(detections=str(detections), data=dataset.spec, protocol=chosen)
    if findings.warnings:
        result.notes.append(findings.summary())
    if chosen == "kitti":
        labels = _kitti_labels(dataset)
        classes = _kitti_classes(dataset, labels)
        truth = [labels.objects(i) for i in range(len(dataset))]
        found = (
            read_kitti_folder(detections, dataset) if folder
            else _as_kitti(read_coco_results(detections, dataset), dataset)
        )  # fmt: skip
        result.kitti = kitti_ap.evaluate(truth, found, classes)
    else:
        results = (
            _as_coco(read_kitti_folder(detections, dataset), dataset) if folder
            else read_coco_results(detections, dataset)
        )  # fmt: skip
        truth = coco_ground_truth(dataset)
        result.coco = coco_ap.evaluate_json(truth, results, accuracy or Accuracy())
        result.notes += filter(None, [result.coco.note()])
    return result


def _kitti_labels(dataset: Dataset) -> KittiLabels:
    """The labels as the KITTI protocol needs them.

    Raises:
        UserError: ``protocol-data`` where the data set has none.
    """
    labels = dataset.protocols.kitti
    if labels is None:
        raise UserError(
            "protocol-data",
            f"{dataset.spec}: the KITTI protocol needs KITTI labels (occlusion, truncation, "
            "DontCare); use --protocol coco",
        )
    return labels


def _kitti_classes(dataset: Dataset, labels: KittiLabels) -> list[str]:
    """The benchmark's three classes as far as the data set has them.

    Raises:
        UserError: ``protocol-data`` where it has none.
    """
    classes = kitti_ap.evaluable(labels)
    if not classes:
        raise UserError(
            "protocol-data",
            f"{dataset.spec}: none of its classes ({', '.join(dataset.classes.names)}) is one the "
            f"KITTI protocol evaluates ({', '.join(kitti_ap.OFFICIAL_CLASSES)}, unmerged)",
        )
    return classes


def read_coco_results(path: Path, dataset: Dataset) -> list[dict[str, Any]]:
    """Reads and checks a COCO results file.

    Raises:
        UserError: See :func:`score`; an entry is named by its number, from 0.
    """
    try:
        entries = json.loads(path.read_text(encoding=TEXT))
    except OSError as error:
        raise UserError("detections-unreadable", f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError("detections-unreadable", f"{path}: not JSON: {error}") from error
    if not isinstance(entries, list):
        raise UserError(
            "detections-unreadable", f"{path}: a COCO results file is a list of detections"
        )
    image_ids = {dataset.image_id(i) for i in range(len(dataset))}
    categories = set(dataset.classes.category_ids)
    for number, entry in enumerate(entries):
        _check_entry(entry, f"{path}: entry {number}")
        if entry["image_id"] not in image_ids:
            raise UserError(
                "detections-image",
                f"{path}: entry {number}: image_id {entry['image_id']!r} is not in {dataset.spec}",
            )
        if entry["category_id"] not in categories:
            raise UserError(
                "detections-class",
                f"{path}: entry {number}: category_id {entry['category_id']} is not in "
                f"{dataset.spec}, which has {_listed(sorted(categories))}",
            )
    return entries


def read_kitti_folder(folder: Path, dataset: Dataset) -> list[list[KittiObject]]:
    """Reads the result file of every image of a data set; files of other images are left alone.

    Raises:
        UserError: See :func:`score`; a row is named by file and line.
    """
    found = []
    names = set(dataset.classes.names)
    stems = [dataset.image_path(i).stem for i in range(len(dataset))]
    missing = [stem for stem in stems if not (folder / f"{stem}.txt").is_file()]
    if missing:
        raise UserError(
            "detections-image",
            f"{folder}: {len(missing)} of {len(stems)} images have no result file (first: "
            f"{missing[0]}.txt); an image without detections has an empty one",
        )
    for stem in progress(stems, "reading detections"):
        path = folder / f"{stem}.txt"
        objects = read_label_file(path)
        for row in objects:
            if row.score is None:
                raise UserError(
                    "detections-entry",
                    f"{path}:{row.line}: 15 columns: a result row ends with its score",
                )
            if row.type not in names:
                raise UserError(
                    "detections-class",
                    f"{path}:{row.line}: class {row.type!r} is none of "
                    f"{', '.join(dataset.classes.names)}",
                )
        found.append(objects)
    return found


def _check_entry(entry: Any, where: str) -> None:
    if not isinstance(entry, dict):
        raise UserError("detections-entry", f"{where}: not an object")
    if not is_image_id(entry.get("image_id")):
        raise UserError("detections-entry", f"{where}: image_id is no whole number and no text")
    category = entry.get("category_id")
    if not isinstance(category, int) or isinstance(category, bool):
        raise UserError("detections-entry", f"{where}: category_id is not a whole number")
    box = entry.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        raise UserError("detections-entry", f"{where}: bbox is not [x, y, width, height]")
    if not _is_number(entry.get("score")):
        raise UserError("detections-entry", f"{where}: score is not a number")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _listed(ids: list[int]) -> str:
    text = ", ".join(map(str, ids[:10]))
    return f"{text}, ... ({len(ids)} ids)" if len(ids) > 10 else text


def _as_kitti(results: list[dict[str, Any]], dataset: Dataset) -> list[list[KittiObject]]:
    names = dict(zip(dataset.classes.category_ids, dataset.classes.names, strict=True))
    position = {dataset.image_id(i): i for i in range(len(dataset))}
    found: list[list[KittiObject]] = [[] for _ in range(len(dataset))]
    for r in results:
        x, y, w, h = r["bbox"]
        found[position[r["image_id"]]].append(
            KittiObject(names[r["category_id"]], -1, -1, -10, (x, y, x + w, y + h), r["score"])
        )
    return found


def _as_coco(found: list[list[KittiObject]], dataset: Dataset) -> list[dict[str, Any]]:
    ids = dict(zip(dataset.classes.names, dataset.classes.category_ids, strict=True))
    return [
        {
            "image_id": dataset.image_id(i),
            "category_id": ids[o.type],
            "bbox": [o.box[0], o.box[1], o.box[2] - o.box[0], o.box[3] - o.box[1]],
            "score": o.score,
        }
        for i, objects in enumerate(found)
        for o in objects
    ]


def coco_text(ap: CocoAp) -> str:
    """COCO AP as lines of text, AP times 100."""
    width = max(map(len, ap.per_class), default=5)
    lines = [f"{'class':{width}}  {'boxes':>6}  {'AP':>5}  {'AP50':>5}"]
    lines += [
        f"{name:{width}}  {c.count:6}  {percent(c.ap):>5}  {percent(c.ap50):>5}"
        for name, c in ap.per_class.items() if c.count
    ]  # fmt: skip
    lines += [
        f"{'all':{width}}  {ap.n_gt:6}  {percent(ap.ap):>5}  {percent(ap.ap50):>5}",
        f"AP75 {percent(ap.ap75)}, small {percent(ap.ap_small)}, medium {percent(ap.ap_medium)}, "
        f"large {percent(ap.ap_large)}; {ap.images} images",
        f"AR {percent(ap.ar)} (small {percent(ap.ar_small)}, medium "
        f"{percent(ap.ar_medium)}, large {percent(ap.ar_large)})",
    ]
    lines += [f"AP at IoU {iou}: {percent(value)}" for iou, value in (ap.at_iou or {}).items()]
    return "\n".join(lines)


def kitti_text(ap: KittiAp) -> str:
    """KITTI AP as lines of text, AP times 100."""
    lines = [f"{'class':12}  {'points':>6}  {'easy':>7}  {'moderate':>8}  {'hard':>7}"]
    for name, found in ap.per_class.items():
        levels = (found.easy, found.moderate, found.hard)
        for points, values in (
            (40, [_two(level.ap40) + level.mark for level in levels]),
            (11, [_two(level.ap11) + level.mark for level in levels]),
            ("boxes", [str(level.count) for level in levels]),
        ):
            lines.append(f"{name:12}  {points:>6}  {values[0]:>7}  {values[1]:>8}  {values[2]:>7}")
    return "\n".join([*lines, *filter(None, [ap.note()]), f"{ap.images} images"])


def _two(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"
