"""What a budget speaks of: the comparison of the detections, and average precision."""

from __future__ import annotations

from collections.abc import Sequence

from detr.errors import UserError
from detr.metrics import coco_ap
from detr.types import Detections
from engines.parity import Budget, Outcome
from export.parity.compare import compare_detections
from export.parity.samples import Samples


def outcome(
    samples: Samples,
    reference: Sequence[Detections],
    candidate: Sequence[Detections],
    reference_ap: float | None,
    budget: Budget,
) -> Outcome:
    """How far a graph's detections are from the reference's, AP included where it has one.

    Args:
        samples: The images.
        reference: What must be reproduced, one per image.
        candidate: What the graph finds.
        reference_ap: The reference's :func:`samples_ap`; ``None`` leaves AP out.
        budget: Says which detections count.
    """
    parity = compare_detections(reference, candidate, budget)
    ap = None
    if reference_ap is not None and parity.not_finite == 0:
        ap, _ = samples_ap(samples, candidate)
    return Outcome(parity=parity, ap=ap, reference_ap=reference_ap)


def samples_ap(
    samples: Samples, detections: Sequence[Detections]
) -> tuple[float | None, tuple[str, ...]]:
    """COCO AP, or why there is none."""
    if samples.dataset is None:
        return None, ()
    try:
        return coco_ap.evaluate(samples.dataset, detections, samples.indices).ap, ()
    except UserError as error:
        if error.code == "detections-not-finite":
            raise
        return None, (f"AP was not compared: {error.message}",)
