"""Average precision of a torch detector, through the preprocessing every engine uses."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from detr.cli_support import progress
from detr.data.dataset import Dataset, evenly_spaced
from detr.data.preprocess import PreprocessConfig, preprocess
from detr.metrics.coco_ap import CocoAp, evaluate
from detr.models.protocol import ObjectDetector
from detr.suppression import suppress
from detr.types import Detections

_BATCH = 8


@torch.no_grad()
def detect(
    detector: ObjectDetector,
    dataset: Dataset,
    config: PreprocessConfig,
    indices: Sequence[int],
    nms: float | None = None,
) -> list[Detections]:
    """Runs a detector (set to evaluation mode for the time) over images of a data set.

    Args:
        detector: What is run.
        dataset: Gives the images.
        config: Canvas and normalization.
        indices: Which images.
        nms: IoU above which a better detection of the same class drops another.
    """
    device = next(detector.parameters()).device
    training = detector.training
    detector.eval()
    found: list[Detections] = []
    for start in progress(range(0, len(indices), _BATCH), "validation"):
        chunk = indices[start : start + _BATCH]
        inputs = preprocess([dataset.image(i) for i in chunk], config)
        boxes, scores, labels = detector(
            torch.from_numpy(inputs.images).to(device),
            torch.from_numpy(inputs.valid_sizes).to(device),
            torch.from_numpy(inputs.original_sizes).to(device),
        )
        for row in zip(boxes, scores, labels, strict=True):
            one = Detections(*(x.cpu().numpy() for x in row))
            found.append(one if nms is None else suppress(one, nms))
    detector.train(training)
    return found


def measure_ap(
    detector: ObjectDetector,
    dataset: Dataset,
    config: PreprocessConfig,
    images: int | None = None,
    nms: float | None = None,
) -> CocoAp:
    """COCO AP on a data set, or on ``images`` of it spread evenly over its length.

    Args:
        detector: What is measured.
        dataset: Images and labels.
        config: Canvas and normalization.
        images: At most so many.
        nms: See :func:`detect`.
    """
    indices = evenly_spaced(len(dataset), images)
    return evaluate(dataset, detect(detector, dataset, config, indices, nms), indices)


def ap_values(result: CocoAp) -> dict[str, float]:
    """The numbers of a measurement that exist: there may be no box of a size."""
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    values = {name: getattr(result, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}
