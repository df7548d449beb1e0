"""What a rejection looks like, and in which layer it begins."""

from __future__ import annotations

import numpy as np
import onnx

from detr.types import ImageArray
from engines.base import Engine
from engines.bundle import Bundle
from export.parity.compare import Budget, Parity
from export.parity.first_deviation import Deviation, boundaries, first_deviation, torch_values

# Share of the detections that makes a symptom.
_MANY = 0.2
_EXACT = Budget()
# Normalised pixels further apart than rounding.
_SAME_INPUT = 1e-4


def symptoms(parity: Parity) -> set[str]:
    """What kind of difference it is; see :data:`export.parity.diagnose.Symptom`."""
    seen = set()
    expected = max(1, parity.matched + parity.missing + parity.class_flips)
    lost, new = parity.missing / expected, parity.extra / expected
    if parity.not_finite:
        seen.add("not-finite")
    if parity.short or (lost > _MANY and lost > 3 * new):
        seen.add("missing")
    if parity.class_flips > _MANY * expected and parity.class_flips >= parity.missing:
        seen.add("classes")
    exact_boxes = parity.matched > 0 and parity.median_box_px <= _EXACT.box_px_median
    exact_scores = parity.median_score <= _EXACT.score_median
    # With flips, the few matches left are accidents.
    if exact_boxes and not exact_scores and "classes" not in seen:
        seen.add("scores")
    if exact_scores and (not exact_boxes or (lost > _MANY and new > _MANY)):
        seen.add("boxes")
    return seen


def input_symptoms(reference: Engine, engine: Engine, image: ImageArray) -> set[str]:
    """Whether both prepare an image alike."""
    expected, found = reference.prepare([image]), engine.prepare([image])
    if (
        expected.images.shape == found.images.shape
        and np.abs(expected.images - found.images).max() <= _SAME_INPUT
        and np.array_equal(expected.valid_sizes, found.valid_sizes)
        and np.array_equal(expected.original_sizes, found.original_sizes)
    ):
        return set()
    means = (reference.info.preprocess.mean, engine.info.preprocess.mean)
    reverse_mean = means[0] != means[1] and means[0] == means[1][::-1]
    same_shape = expected.images.shape == found.images.shape
    if reverse_mean or (
        same_shape and np.abs(expected.images[:, ::-1] - found.images).max() <= _SAME_INPUT
    ):
        return {"inputs", "inputs-channels"}
    return {"inputs"}


def locate(
    bundle: Bundle, reference: Engine, engine: Engine, image: ImageArray
) -> Deviation | None:
    """The first layer in which an engine leaves its reference, on one image.

    Args:
        bundle: Where the engine comes from.
        reference: The torch model, or an engine that can be asked for intermediate values.
        engine: Likewise.
        image: One on which the two differ.

    Returns:
        ``None`` where either side does not show intermediate values.
    """
    model = onnx.load(str(bundle.model))
    wanted = boundaries(model.graph)
    inputs = reference.prepare([image] * (engine.batch_size or 1))
    names = [boundary.value for boundary in wanted]
    found = engine.intermediates(inputs, names)
    if found is None:
        return None
    if reference.name == "torch":
        from engines.torch_engine import TorchEngine

        assert isinstance(reference, TorchEngine)
        expected = torch_values(reference, inputs, wanted)
    else:
        given = reference.intermediates(inputs, names)
        if given is None:
            return None
        expected = given
    return first_deviation(model.graph, expected, found, bundle.info.precision)
