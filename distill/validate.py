"""Average precision of a torch detector, through the preprocessing every engine uses."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bench.coco_ap import CocoAp, evaluate
from detr.cli_support import progress
from detr.data.dataset import Dataset
from detr.data.preprocess import PreprocessConfig, preprocess
from detr.models import Detector
from detr.types import Detections

_BATCH = 8


@torch.no_grad()
def detect(
    detector: Detector, dataset: Dataset, config: PreprocessConfig, indices: Sequence[int]
) -> list[Detections]:
    """Runs a detector (set to evaluation mode for the time) over images of a data set."""
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
        rows = zip(boxes.cpu().numpy(), scores.cpu().numpy(), labels.cpu().numpy(), strict=True)
        found += [Detections(*row) for row in rows]
    detector.train(training)
    return found


def measure_ap(
    detector: Detector, dataset: Dataset, config: PreprocessConfig, images: int | None = None
) -> CocoAp:
    """COCO AP on a data set, or on ``images`` of it spread evenly over its length."""
    count = len(dataset) if images is None else min(images, len(dataset))
    indices = [i * len(dataset) // count for i in range(count)]
    return evaluate(dataset, detect(detector, dataset, config, indices), indices)
