"""Answers of typed graphs, half precision emulated, without a file in between."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import onnxruntime as ort
from onnx import ModelProto

from detr.data.preprocess import preprocess
from detr.model_info import ModelInfo
from detr.types import Detections
from engines.base import RawDetections
from engines.bundle import OUTPUTS
from engines.half_emulation import half_session
from engines.msda_function import Lowering
from export.parity.compare import Budget, Outcome
from export.parity.engines import average_precision, outcome
from export.parity.samples import Samples
from export.precision.half import Ranges, finish_half, to_half
from export.precision.island_search import Judge
from export.precision.ranges import fill


def half_judge(
    model: ModelProto,
    info: ModelInfo,
    lowering: Lowering,
    ranges: Ranges,
    samples: Samples,
    expected: Sequence[Detections],
    batch: int,
    budget: Budget,
) -> Judge:
    """What an island costs, as a function.

    Args:
        model: The float32 graph.
        info: What the model is.
        lowering: Body of its attention function.
        ranges: See :func:`export.precision.half.to_half`.
        samples: Images to compare on; with labels, AP is compared as well.
        expected: What the torch model finds in them.
        batch: Images per run.
        budget: Its slack around the score threshold is the comparison's.
    """
    images = [samples.image(k) for k in range(len(samples))]
    feeds = [
        vars(preprocess(fill(images[i : i + batch], batch), info.preprocess))
        for i in range(0, len(images), batch)
    ]
    reference_ap, _ = average_precision(samples, expected)

    def judge(island: Collection[str]) -> Outcome:
        typed = to_half(model, island, ranges).model
        finish_half(typed, info.detector, lowering)
        session = half_session(typed)
        found = [x for feed in feeds for x in detections(session, feed)][: len(expected)]
        return outcome(samples, expected, found, reference_ap, budget)

    return judge


def detections(session: ort.InferenceSession, feed: dict[str, Any]) -> list[Detections]:
    """What a loaded graph finds in a prepared batch."""
    raw = RawDetections(*session.run(list(OUTPUTS), feed))
    return [Detections(*one) for one in zip(raw.boxes, raw.scores, raw.labels, strict=True)]
