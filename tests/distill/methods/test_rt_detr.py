"""An RT-DETR as the student of a DINO, as its teacher, and as an RT-DETR's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from detr.config import (
    ContrastiveDenoisingConfig,
    HybridEncoderConfig,
    PositionsConfig,
    SelectedQueriesConfig,
)
from detr.errors import UserError
from detr.models import Detector
from distill.methods import METHODS

RT_DETR: dict[str, Any] = {
    "neck": {"levels": 3, "group_norm": False, "batch_norm": True},
    "positions": PositionsConfig(offset=-1.0, normalized=False),
    "encoder": HybridEncoderConfig(layers=1, ffn=32, width=48, expansion=0.5, blocks=1),
    "queries": SelectedQueriesConfig(number=7, denoising=ContrastiveDenoisingConfig(number=4)),
    "decoder.final_norm": False,
}
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "student of a DINO": (RT_DETR, {}),
    "teacher of a DINO": ({}, RT_DETR),
    "student of its like": (RT_DETR, RT_DETR),
}
# Under which everything a method has takes part in a step this small.
OPTIONS: dict[str, dict[str, Any]] = {
    "qskd": {"threshold": -0.9},
    "kd_detr": {"layers": "paired"},
    "detrdistill": {"on": "memory"},
}


# GO-LSD compares distributions, which neither of the two has; others ask no detector.
WITH_TEACHER = [
    n for n in METHODS if n not in ("stable_dino", "foundation") and not n.startswith("go_lsd")
]


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("name", WITH_TEACHER)
def test_every_method_with_a_teacher_teaches(
    name: str, pair: str, build: Callable[..., Detector], reached: Callable[..., set[str]]
) -> None:
    ours, theirs = PAIRS[pair]
    student, teacher = build(seed=1, **ours).train(), build(seed=2, **theirs).eval()
    moved = reached(name, student, teacher, **OPTIONS.get(name, {}))
    assert any(parameter.startswith("backbone.") for parameter in moved), moved


def test_queries_are_compared_with_maps_of_their_width(
    build: Callable[..., Detector], method: Callable[..., Any]
) -> None:
    student, teacher = build(seed=1), build(seed=2, **RT_DETR)
    with pytest.raises(UserError, match="48 channels at its neck and its queries 32") as caught:
        method("detrdistill", student, teacher, on="neck")
    assert caught.value.code == "method-width"
    method("detrdistill", student, build(seed=2, **{**RT_DETR, "encoder.width": None}), on="neck")


@pytest.mark.slow
def test_stable_dino_trains_one_alone(
    build: Callable[..., Detector], method: Callable[..., Any], take_step: Callable[..., Any]
) -> None:
    student = build(seed=1, **RT_DETR).train()
    tested = method("stable_dino", student, None)
    losses = tested.detection_losses(take_step(student, None, [tested]))
    torch.stack(list(losses.values())).sum().backward()
    grads = [p.grad for n, p in student.named_parameters() if n.startswith("backbone.")]
    assert all(grad is None or grad.isfinite().all() for grad in grads)
    assert any(grad is not None and grad.any() for grad in grads)
