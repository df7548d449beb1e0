"""Answers of typed graphs, half precision emulated, without a file in between."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import onnxruntime as ort
from onnx import ModelProto

from detr.data.preprocess import Inputs, preprocess
from detr.model_info import BundledInfo
from detr.types import Detections
from engines.base import RawDetections
from engines.half_emulation import half_session
from engines.msda_function import Lowering
from engines.parity import Budget, Outcome
from export.parity.outcome import outcome, samples_ap
from export.parity.samples import Samples
from export.precision.half import Ranges, finish_half, to_half
from export.precision.island_search import Comparator
from export.precision.ranges import fill


def half_comparator(
    model: ModelProto,
    info: BundledInfo,
    lowering: Lowering,
    ranges: Ranges,
    samples: Samples,
    reference: Sequence[Detections],
    batch: int,
    budget: Budget,
) -> Comparator:
    """What an island costs, as a function.

    Args:
        model: The float32 graph.
        info: What the model is.
        lowering: Body of its attention function.
        ranges: See :func:`export.precision.half.to_half`.
        samples: Images to compare on; with labels, AP is compared as well.
        reference: What the torch model finds in them.
        batch: Images per run.
        budget: Its slack around the score threshold is the comparison's.
    """
    images = [samples.image(k) for k in range(len(samples))]
    feeds = [
        preprocess(fill(images[i : i + batch], batch), info.preprocess)
        for i in range(0, len(images), batch)
    ]
    reference_ap, _ = samples_ap(samples, reference)

    def compare(island: Collection[str]) -> Outcome:
        typed = to_half(model, island, ranges).model
        finish_half(typed, info, lowering)
        session = half_session(typed)
        candidate = [x for feed in feeds for x in session_detections(session, feed)][
            : len(reference)
        ]
        return outcome(samples, reference, candidate, reference_ap, budget)

    return compare


def session_detections(session: ort.InferenceSession, inputs: Inputs) -> list[Detections]:
    """What a loaded graph finds in a prepared batch."""
    raw = RawDetections.of(session.run(None, vars(inputs)), inputs)
    return raw.detections(raw.enlarged())
