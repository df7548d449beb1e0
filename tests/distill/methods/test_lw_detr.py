"""An LW-DETR as the student of a DINO, as its teacher, and as an LW-DETR's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from detr.config import (
    GroupedQueriesConfig,
    NoRefinementConfig,
    ProjectorNeckConfig,
    ScaledBoxesConfig,
    VitBackboneConfig,
)
from detr.errors import UserError
from detr.models import Detector
from distill.methods import METHODS

LW_DETR: dict[str, Any] = {
    "backbone": VitBackboneConfig(
        width=24, heads=4, side=5, windows=2, windowed=(0, 2), taps=(1, 3)
    ),
    "neck": ProjectorNeckConfig(scales=(2.0, 1.0, 0.5), blocks=1),
    "encoder.layers": 0,
    "queries": GroupedQueriesConfig(number=7, groups=3),
    "decoder.refinement": NoRefinementConfig(),
    "decoder.cross_attention.heads": 8,
    "heads.boxes": ScaledBoxesConfig(),
}
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "student of a DINO": (LW_DETR, {}),
    "teacher of a DINO": ({}, LW_DETR),
    "student of its like": (LW_DETR, LW_DETR),
}
# Under which everything a method has takes part in a step this small.
OPTIONS: dict[str, dict[str, Any]] = {
    "qskd": {"threshold": -0.9},
    "kd_detr": {"layers": "paired"},
    "detrdistill": {"on": "memory"},
    # Attention to the memory has heads of its own number.
    "d3etr": {"heads": "mean"},
}
# GO-LSD compares distributions, which neither of the two has; of the others no detector teaches.
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


def test_attention_of_other_heads_is_not_compared_head_by_head(
    build: Callable[..., Detector], method: Callable[..., Any]
) -> None:
    student, teacher = build(seed=1), build(seed=2, **LW_DETR)
    with pytest.raises(UserError, match="4 heads and the teacher 8; set heads: mean") as caught:
        method("d3etr", student, teacher)
    assert caught.value.code == "method-heads"


def test_maps_of_the_backbone_are_no_levels(
    build: Callable[..., Detector], method: Callable[..., Any]
) -> None:
    """All of a vision transformer's have one stride, which none of the levels is made of alone."""
    student, teacher = build(seed=1, **LW_DETR), build(seed=2)
    with pytest.raises(UserError, match="share no backbone map") as caught:
        method("mgd", student, teacher, on="backbone")
    assert caught.value.code == "method-levels"


@pytest.mark.slow
def test_stable_dino_trains_one_alone(
    build: Callable[..., Detector], method: Callable[..., Any], take_step: Callable[..., Any]
) -> None:
    student = build(seed=1, **LW_DETR).train()
    tested = method("stable_dino", student, None)
    losses = tested.detection_losses(take_step(student, None, [tested]))
    assert {"groups/class", "groups_proposals/giou"} <= losses.keys()
    torch.stack(list(losses.values())).sum().backward()
    grads = [p.grad for n, p in student.named_parameters() if n.startswith("backbone.")]
    assert any(grad is not None and grad.any() for grad in grads)
