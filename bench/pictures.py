"""Pictures of a report: examples chosen beforehand, and the worst mistakes."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from bench.report.model import Example, Picture, Report
from detr.data.dataset import Dataset, Labels
from detr.data.draw import draw, masks_at
from detr.data.value_range import to_bytes
from detr.errors import UserError
from detr.metrics.confusion import Mistake, worst
from detr.types import Detections, ImageArray

_EXAMPLE_WIDTH = 640
# Of a mistake: what is shown around its box, in box sizes and in pixels at least.
_AROUND, _LEAST = 2.5, 120.0
_MISTAKE = (320, 240)
_EACH = 4


def example(
    models: Sequence[tuple[str, Detections]], dataset: Dataset, i: int, image: ImageArray
) -> Example:
    """Image ``i`` with its ground truth, and with what every model found in it."""
    names = dataset.classes.names
    # Small pictures are enlarged, or the names on the boxes would cover them.
    scale = _EXAMPLE_WIDTH / image.shape[1]
    size = (_EXAMPLE_WIDTH, max(1, round(image.shape[0] * scale)))
    small = np.asarray(
        Image.fromarray(to_bytes(image, None)).resize(size, Image.Resampling.LANCZOS)
    )
    truth = _truth(dataset, i, any(found.masks is not None for _, found in models))
    boxes = np.concatenate([truth.boxes, truth.ignore]) * scale
    labels = np.concatenate([truth.labels, np.full(len(truth.ignore), -1)])
    masks = masks_at(truth.masks, image, small)
    if masks is not None:
        masks += [None] * len(truth.ignore)
    pictures = [
        Picture(
            title="ground truth",
            boxes=len(truth.labels),
            uri=_jpeg(draw(small, boxes, labels, names, masks=masks)),
        )
    ]
    for name, detections in models:
        found = detections.above(Report.model_fields["score_threshold"].default)
        masks = masks_at(found.masks, image, small)
        drawn = draw(small, found.boxes * scale, found.labels, names, found.scores, masks)
        pictures.append(Picture(title=name, boxes=len(found), uri=_jpeg(drawn)))
    return Example(title=dataset.image_path(i).name, pictures=pictures)


def _truth(dataset: Dataset, i: int, masks: bool) -> Labels:
    """With masks where a model finds some, unless the labels have none."""
    if masks:
        try:
            return dataset.labels_with_masks(i)
        except UserError as error:
            if not error.code.startswith("mask-"):
                raise
    return dataset.labels(i)


def mistake_pictures(
    name: str,
    mistakes: Sequence[Mistake],
    dataset: Dataset,
    indices: Sequence[int],
    truth: dict[str, Any],
) -> Example | None:
    """The worst mistakes of each kind, cut out of their images; labeled objects are gray.

    Args:
        name: Of the model.
        mistakes: All there are.
        dataset: Whose images; those that cannot be read are left out.
        indices: Its images that were measured.
        truth: COCO ground truth of these.
    """
    pictures = []
    names = dataset.classes.names
    for mistake in worst(mistakes, _EACH):
        i = indices[mistake.image]
        try:
            image = dataset.image(i)
        except UserError:
            continue
        own = truth["images"][mistake.image]["id"]
        labeled = [
            (x, y, x + w, y + h)
            for x, y, w, h in (a["bbox"] for a in truth["annotations"] if a["image_id"] == own)
        ]
        label = mistake.truth if mistake.kind == "missed" else mistake.found
        scores = None if mistake.kind == "missed" else np.full(1 + len(labeled), mistake.weight)
        pixels, move, scale = _cut(image, mistake.box)
        boxes = (np.array([mistake.box, *labeled], dtype=np.float64) - move) * scale
        drawn = draw(pixels, boxes, np.array([label] + [-1] * len(labeled)), names, scores)
        what = {
            "missed": f"{names[mistake.truth]} missed",
            "false alarm": f"{names[mistake.found]} where there is none",
            "duplicate": f"{names[mistake.found]} found twice",
            "wrong class": f"{names[mistake.truth]} taken for {names[mistake.found]}",
        }[mistake.kind]
        title = f"{what}, {dataset.image_path(i).name}"
        pictures.append(Picture(title=title, boxes=1, uri=_jpeg(drawn)))
    return Example(title=name, pictures=pictures) if pictures else None


def _cut(
    image: ImageArray, box: tuple[float, float, float, float]
) -> tuple[ImageArray, Any, float]:
    """The surroundings of a box at one size, and by what boxes have to be moved and scaled."""
    x0, y0, x1, y1 = box
    aspect = _MISTAKE[0] / _MISTAKE[1]
    height = max(_AROUND * (y1 - y0), _AROUND * (x1 - x0) / aspect, _LEAST)
    width = height * aspect
    whole = Image.fromarray(to_bytes(image, None))
    left = _within((x0 + x1 - width) / 2, width, whole.width)
    top = _within((y0 + y1 - height) / 2, height, whole.height)
    cut = whole.crop((round(left), round(top), round(left + width), round(top + height)))
    pixels = np.asarray(cut.resize(_MISTAKE, Image.Resampling.LANCZOS))
    return pixels, np.array([round(left), round(top)] * 2), _MISTAKE[0] / cut.width


def _within(start: float, size: float, whole: int) -> float:
    """A window moved into the image; the part of a larger one beyond the border stays black."""
    return start if size > whole else min(max(start, 0.0), whole - size)


def _jpeg(image: ImageArray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
