"""Anyone's detections from files: COCO results, KITTI result folders, and one as the other."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from detr.cli_support import progress
from detr.data.dataset import Dataset
from detr.data.kitti_rows import KittiObject, read_label_file
from detr.data.segmentation import read_segmentation
from detr.errors import UserError
from detr.files import TEXT
from detr.masks import Rle
from detr.types import Detections, is_image_id


def read_coco_results(path: Path, dataset: Dataset) -> list[dict[str, Any]]:
    """Reads and checks a COCO results file.

    Where entries have masks, all of them need one; a box that is not told is that around the mask.

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
    image_ids = {dataset.image_id(i): i for i in range(len(dataset))}
    categories = set(dataset.classes.category_ids)
    masks = any(isinstance(entry, dict) and "segmentation" in entry for entry in entries)
    for number, entry in enumerate(entries):
        _check_entry(entry, f"{path}: entry {number}", masks)
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
        if masks:
            size = dataset.image_size(image_ids[entry["image_id"]])
            _read_mask(entry, size, f"{path}: entry {number}")
    return entries


def _read_mask(entry: dict[str, Any], size: tuple[int, int], where: str) -> None:
    """Whatever its form, the mask becomes packed run lengths."""
    try:
        mask = read_segmentation(entry["segmentation"], size, where).rle(size)
    except UserError as error:
        raise UserError("detections-entry", error.message) from error
    entry["segmentation"] = mask.to_json()
    if "bbox" not in entry:
        x0, y0, x1, y1 = mask.box
        entry["bbox"] = [x0, y0, x1 - x0, y1 - y0]


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


def _check_entry(entry: Any, where: str, masks: bool) -> None:
    if not isinstance(entry, dict):
        raise UserError("detections-entry", f"{where}: not an object")
    if not is_image_id(entry.get("image_id")):
        raise UserError("detections-entry", f"{where}: image_id is no whole number and no text")
    category = entry.get("category_id")
    if not isinstance(category, int) or isinstance(category, bool):
        raise UserError("detections-entry", f"{where}: category_id is not a whole number")
    if masks and "segmentation" not in entry:
        raise UserError(
            "detections-entry", f"{where}: has no segmentation, though other entries do"
        )
    box = entry.get("bbox")
    if masks and "bbox" not in entry:
        pass
    elif not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        raise UserError("detections-entry", f"{where}: bbox is not [x, y, width, height]")
    if not _is_number(entry.get("score")):
        raise UserError("detections-entry", f"{where}: score is not a number")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _listed(ids: list[int]) -> str:
    text = ", ".join(map(str, ids[:10]))
    return f"{text}, ... ({len(ids)} ids)" if len(ids) > 10 else text


def as_kitti(results: list[dict[str, Any]], dataset: Dataset) -> list[list[KittiObject]]:
    names = dict(zip(dataset.classes.category_ids, dataset.classes.names, strict=True))
    position = {dataset.image_id(i): i for i in range(len(dataset))}
    found: list[list[KittiObject]] = [[] for _ in range(len(dataset))]
    for r in results:
        x, y, w, h = r["bbox"]
        found[position[r["image_id"]]].append(
            KittiObject(names[r["category_id"]], -1, -1, -10, (x, y, x + w, y + h), r["score"])
        )
    return found


def as_coco(found: list[list[KittiObject]], dataset: Dataset) -> list[dict[str, Any]]:
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


def as_detections(results: list[dict[str, Any]], dataset: Dataset) -> list[Detections]:
    """COCO results as one value per image of the data set, best first."""
    labels = {category: k for k, category in enumerate(dataset.classes.category_ids)}
    position = {dataset.image_id(i): i for i in range(len(dataset))}
    rows: list[list[tuple[float, ...]]] = [[] for _ in range(len(dataset))]
    masks: list[list[Rle]] = [[] for _ in range(len(dataset))]
    for r in results:
        x, y, w, h = r["bbox"]
        label = labels[r["category_id"]]
        rows[position[r["image_id"]]].append((x, y, x + w, y + h, r["score"], label))
        if "segmentation" in r:
            height, width = r["segmentation"]["size"]
            masks[position[r["image_id"]]].append(Rle((height, width), r["segmentation"]["counts"]))
    found = []
    for own, shown in zip(rows, masks, strict=True):
        table = np.array(own, dtype=np.float64).reshape(-1, 6)
        order = np.argsort(-table[:, 4], kind="stable")
        table = table[order]
        found.append(
            Detections(
                table[:, :4].astype(np.float32),
                table[:, 4].astype(np.float32),
                table[:, 5].astype(np.int64),
                tuple(shown[k] for k in order) if shown else None,
            )
        )
    return found
