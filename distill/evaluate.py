"""Average precision of a torch detector, through the preprocessing every engine uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from detr.cli_support import progress
from detr.data.dataset import Dataset, evenly_spaced
from detr.data.preprocess import PreprocessConfig, preprocess
from detr.errors import UserError
from detr.metrics.coco_ap import Accuracy, CocoAp, evaluate
from detr.models.protocol import ObjectDetector
from detr.suppression import suppress
from detr.types import Detections
from distill.data.unreadable import LeaveOut, readable
from engines.base import RawDetections

_BATCH = 8


@torch.no_grad()
def detect(
    detector: ObjectDetector,
    dataset: Dataset,
    config: PreprocessConfig,
    indices: Sequence[int],
    nms: float | None = None,
    leave_out: LeaveOut | None = None,
) -> tuple[list[int], list[Detections]]:
    """Runs a detector (set to evaluation mode for the time) over images of a data set.

    Args:
        detector: What is run.
        dataset: Gives the images.
        config: Canvas and normalization.
        indices: Which images.
        nms: IoU above which a better detection of the same class drops another.
        leave_out: See :func:`distill.data.unreadable.readable`.

    Returns:
        The images that could be read, and what was found in each.
    """
    device = next(detector.parameters()).device
    training = detector.training
    detector.eval()
    found: list[Detections] = []
    read: list[int] = []
    for start in progress(range(0, len(indices), _BATCH), "validation"):
        images = list(readable(dataset, indices[start : start + _BATCH], leave_out))
        if not images:
            continue
        read += [i for i, _ in images]
        inputs = preprocess([image for _, image in images], config)
        outputs = detector(
            torch.from_numpy(inputs.images).to(device),
            torch.from_numpy(inputs.valid_sizes).to(device),
            torch.from_numpy(inputs.original_sizes).to(device),
        )
        raw = RawDetections.of([x.cpu().numpy() for x in outputs], inputs)
        batch = raw.detections(raw.enlarged())
        found += batch if nms is None else [suppress(one, nms) for one in batch]
    detector.train(training)
    return read, found


class Measured(NamedTuple):
    """What a detector is worth on a data set.

    Attributes:
        boxes: AP of its boxes.
        masks: AP of its masks, if it finds any.
    """

    boxes: CocoAp
    masks: CocoAp | None = None

    @property
    def values(self) -> dict[str, float]:
        """The numbers that exist by name: there may be no object of a size."""
        of_masks = {} if self.masks is None else ap_values(self.masks)
        return ap_values(self.boxes) | {f"mask_{name}": x for name, x in of_masks.items()}

    def text(self) -> str:
        """For a person."""
        told = f"AP {self.boxes.ap:.3f}, AP50 {self.boxes.ap50:.3f}"
        if self.masks is None:
            return told
        return f"{told}, mask AP {self.masks.ap:.3f}, mask AP50 {self.masks.ap50:.3f}"


def measure_ap(
    detector: ObjectDetector,
    dataset: Dataset,
    config: PreprocessConfig,
    images: int | None = None,
    nms: float | None = None,
    leave_out: LeaveOut | None = None,
) -> Measured:
    """COCO AP on a data set, or on ``images`` of it spread evenly over its length.

    Args:
        detector: What is measured.
        dataset: Images and labels.
        config: Canvas and normalization.
        images: At most so many.
        nms: See :func:`detect`.
        leave_out: See :func:`detect`; AP is that of the images that can be read.

    Raises:
        UserError: ``images-unreadable`` where none can be read.
    """
    indices = evenly_spaced(len(dataset), images)
    read, found = detect(detector, dataset, config, indices, nms, leave_out)
    if not read:
        raise UserError("images-unreadable", f"{dataset.spec}: no image could be read")
    boxes = evaluate(dataset, found, read)
    if any(one.masks is None for one in found):
        return Measured(boxes)
    return Measured(boxes, evaluate(dataset, found, read, Accuracy(overlap="segm")))


def ap_values(result: CocoAp) -> dict[str, float]:
    """The numbers of a measurement that exist: there may be no box of a size."""
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    values = {name: getattr(result, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}
