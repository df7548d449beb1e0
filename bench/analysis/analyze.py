"""From detections and labels to an :class:`~bench.analysis.model.Analysis`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.analysis.model import Analysis
from bench.analysis.properties import Property, label_properties, size_of, table_properties
from detr.data.dataset import Dataset
from detr.metrics.confusion import Mistake, confusion
from detr.metrics.outcomes import GroundTruth, Outcomes, precision_curves
from detr.metrics.slices import Slicing, slice_accuracy
from detr.types import Detections

SCORE, IOU = 0.3, 0.5


def properties(dataset: Dataset, indices: Sequence[int], table: Path | None) -> list[Property]:
    """Everything there is to slice by; read before anything is measured.

    Args:
        dataset: The data.
        indices: Images that are measured.
        table: The user's CSV file.

    Raises:
        UserError: ``slices-file``, and what reading the labels raises.
    """
    own = [] if table is None else table_properties(table, dataset, indices)
    return [*label_properties(dataset, indices), *own]


def analyze(
    truth: dict[str, Any],
    detections: Sequence[Detections],
    outcomes: Outcomes,
    slicings: Sequence[Property],
) -> tuple[Analysis, list[Mistake]]:
    """Curves, confusions and slices of one artifact, and its mistakes.

    Args:
        truth: COCO ground truth of the images.
        detections: One per image.
        outcomes: Of the detections.
        slicings: What :func:`properties` found.
    """
    assert outcomes.area is not None
    matrix, mistakes = confusion(truth, detections, SCORE, IOU)
    curves = precision_curves(outcomes, GroundTruth.of(truth))
    names = [category["name"] for category in truth["categories"]]
    by_class = {name: curve for name, curve in zip(names, curves, strict=True) if len(curve)}
    mean = np.mean(list(by_class.values()), axis=0)
    sizes = [size_of(area) for area in outcomes.area.tolist()]
    found = [
        slice_accuracy(
            Slicing(one.by, one.of, one.values, one.order, sizes if one.by == "box size" else None),
            truth,
            outcomes,
            SCORE,
        )
        for one in slicings
    ]
    return (
        Analysis(
            score=SCORE,
            iou=IOU,
            curves={
                name: [round(v, 4) for v in curve.tolist()]
                for name, curve in {"all": mean, **by_class}.items()
            },
            confusion=matrix,
            slices=found,
        ),
        mistakes,
    )
