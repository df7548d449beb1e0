"""Which of the field's known mistakes a rejected export looks like.

The list is data (``known_pitfalls.yaml``): the conditions, what it usually is, what to do,
and where it was reported.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path

import numpy as np
import yaml

from detr.types import ImageArray
from engines.base import Engine
from engines.bundle import BundleInfo
from engines.parity import Budget, Parity
from engines.verdict import Deviation, Pitfall, Place, Symptom

LIST = Path(__file__).parent / "known_pitfalls.yaml"

# Share of the detections that makes a symptom.
_MANY = 0.2
_EXACT = Budget()
# Median IoU of masks that differ by roundings.
_SAME_MASKS = 0.999
# Normalized pixels further apart than rounding.
_SAME_INPUT = 1e-4


def symptoms(parity: Parity) -> set[Symptom]:
    """What kind of difference it is."""
    kinds: set[Symptom] = set()
    expected = max(1, parity.matched + parity.missing + parity.class_flips)
    lost, new = parity.missing / expected, parity.extra / expected
    if parity.not_finite:
        kinds.add("not-finite")
    if parity.short or (lost > _MANY and lost > 3 * new):
        kinds.add("missing")
    if parity.class_flips > _MANY * expected and parity.class_flips >= parity.missing:
        kinds.add("classes")
    exact_boxes = parity.matched > 0 and parity.median_box_px <= _EXACT.box_px_median
    exact_scores = parity.median_score <= _EXACT.score_median
    # With flips, the few matches left are accidents.
    if exact_boxes and not exact_scores and "classes" not in kinds:
        kinds.add("scores")
    if exact_scores and (not exact_boxes or (lost > _MANY and new > _MANY)):
        kinds.add("boxes")
    # In half precision masks differ a little wherever anything does: they alone must.
    exact_masks = parity.median_mask_iou is None or parity.median_mask_iou >= _SAME_MASKS
    alike = not (parity.missing or parity.extra or parity.class_flips or parity.not_finite)
    if exact_boxes and exact_scores and alike and not exact_masks:
        kinds.add("masks")
    return kinds


def input_symptoms(reference: Engine, engine: Engine, image: ImageArray) -> set[Symptom]:
    """Whether both prepare an image alike."""
    expected, given = reference.prepare([image]), engine.prepare([image])
    if (
        expected.images.shape == given.images.shape
        and np.abs(expected.images - given.images).max() <= _SAME_INPUT
        and np.array_equal(expected.valid_sizes, given.valid_sizes)
        and np.array_equal(expected.original_sizes, given.original_sizes)
    ):
        return set()
    means = (reference.info.preprocess.mean, engine.info.preprocess.mean)
    reverse_mean = means[0] != means[1] and means[0] == means[1][::-1]
    same_shape = expected.images.shape == given.images.shape
    if reverse_mean or (
        same_shape and np.abs(expected.images[:, ::-1] - given.images).max() <= _SAME_INPUT
    ):
        return {"inputs", "inputs-channels"}
    return {"inputs"}


def diagnose(
    symptoms: Collection[Symptom],
    deviation: Deviation,
    operators: Collection[str],
    info: BundleInfo,
    engine: str,
) -> Pitfall | None:
    """The known mistake with the most conditions met, or ``None``.

    Args:
        symptoms: What kind of difference it is.
        deviation: Where it begins.
        operators: Operator types in the stretch it begins in, function bodies included.
        info: Of the bundle; what it does already is not advised.
        engine: Name of the engine.
    """
    layer = deviation.layer
    place: Place = ""
    if layer not in ("", "preprocessing", "decode"):
        place = "feeding" if deviation.outside else "alone"
    fitting = [
        pitfall
        for pitfall in known_pitfalls()
        if _any(pitfall.when.symptoms, symptoms)
        and _any(pitfall.when.operators, operators)
        and _any(pitfall.when.precisions, [info.precision])
        and _any(pitfall.when.engines, [engine])
        and pitfall.when.place in ("", place)
        and (not pitfall.when.layer or (layer and re.search(pitfall.when.layer, layer)))
    ]
    # What differs says more than where it begins to.
    best = max(fitting, key=lambda p: (bool(p.when.symptoms), p.when.count()), default=None)
    if best is None or not best.island:
        return best
    return best.model_copy(update={"instead": _island_remedy(best, info)})


def island_advice(info: BundleInfo) -> str:
    """What to do about a graph that half precision or int8 costs too much.

    Args:
        info: Of the bundle, which is not ``fp32``.
    """
    if info.precision_report.search is None:
        return "look for a float32 island that holds with --search-islands --data DATA"
    return (
        "the float32 island was searched already, so search it on images more like these, or "
        "export with --precision fp32"
    )


def _island_remedy(pitfall: Pitfall, info: BundleInfo) -> str:
    """The remedy of a mistake of half precision: what of it the bundle does not do yet."""
    if info.precision == "fp32":
        return pitfall.instead
    names = ", ".join(pitfall.island)
    if set(pitfall.island) <= set(info.island):
        return f"{names} are in the float32 island already: {island_advice(info)}"
    return f"not all of {names} is in the float32 island: {island_advice(info)}"


def _any(condition: Collection[str], facts: Collection[str]) -> bool:
    return not condition or not set(condition).isdisjoint(facts)


@lru_cache(maxsize=1)
def known_pitfalls() -> tuple[Pitfall, ...]:
    """The whole list."""
    entries = yaml.safe_load(LIST.read_text(encoding="utf-8"))
    return tuple(Pitfall.model_validate(entry) for entry in entries)
