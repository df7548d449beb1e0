"""Real-time detectors as the student of a DINO, as its teacher, and as one of their like."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from detr.config import (
    ContrastiveDenoisingConfig,
    Dinov2BackboneConfig,
    GroupedQueriesConfig,
    HybridEncoderConfig,
    NoRefinementConfig,
    PositionsConfig,
    ProjectorNeckConfig,
    ScaledBoxesConfig,
    SelectedQueriesConfig,
    VitBackboneConfig,
)
from detr.data.preprocess import PreprocessConfig
from detr.errors import UserError
from detr.models import Detector
from distill.methods import METHODS
from distill.teachers.chosen_classes import ChosenClasses
from distill.teachers.transformers import load
from tests.distill.teachers import hugging_face_models

RT_DETR: dict[str, Any] = {
    "neck": {"levels": 3, "group_norm": False, "batch_norm": True},
    "positions": PositionsConfig(offset=-1.0, normalized=False),
    "encoder": HybridEncoderConfig(layers=1, ffn=32, width=48, expansion=0.5, blocks=1),
    "queries": SelectedQueriesConfig(number=7, denoising=ContrastiveDenoisingConfig(number=4)),
    "decoder.final_norm": False,
}
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
RF_DETR: dict[str, Any] = {
    **LW_DETR,
    "backbone": Dinov2BackboneConfig(
        patch=16, width=24, heads=4, side=5, windows=2, windowed=(0, 1), taps=(1, 3)
    ),
    "neck": ProjectorNeckConfig(scales=(2.0, 1.0, 0.5), blocks=1, norm="layer"),
}
FAMILIES: dict[str, dict[str, Any]] = {
    "rt-detr": RT_DETR,
    "lw-detr": LW_DETR,
    "rf-detr": RF_DETR,
}
# Under which everything a method has takes part in a step this small.
OPTIONS: dict[str, dict[str, Any]] = {
    "qskd": {"threshold": -0.9},
    "kd_detr": {"layers": "paired"},
    "detrdistill": {"on": "memory"},
}
# GO-LSD compares distributions, which none of these has; of the others no detector teaches.
WITH_TEACHER = [
    n for n in METHODS if n not in ("stable_dino", "foundation") and not n.startswith("go_lsd")
]


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["student of a DINO", "teacher of a DINO", "student of its like"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", WITH_TEACHER)
def test_every_method_with_a_teacher_teaches(
    name: str,
    family: str,
    pair: str,
    build: Callable[..., Detector],
    reached: Callable[..., set[str]],
) -> None:
    ours = {} if pair == "teacher of a DINO" else FAMILIES[family]
    theirs = {} if pair == "student of a DINO" else FAMILIES[family]
    student, teacher = build(seed=1, **ours).train(), build(seed=2, **theirs).eval()
    options = OPTIONS.get(name, {})
    if name == "d3etr" and student.facts.cross_heads != teacher.facts.cross_heads:
        options = {"heads": "mean"}
    moved = reached(name, student, teacher, **options)
    assert any(parameter.startswith("backbone.") for parameter in moved), moved


# What a detector of the transformers library can teach, which is never asked queries.
OUTSIDE: dict[str, dict[str, Any]] = {
    "clockdistill": {"target_aware": False, "general": False},
    "kd_detr": {"general": False},
    "d3etr": {"self_attention": False, "cross_attention": False},
    "detrdistill": {"on": "memory"},
    "fitnet": {},
    "mgd": {},
    "fgd": {},
    "defeat": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lw_detr", "rf_detr"])
@pytest.mark.parametrize("family", ["lw-detr", "rf-detr"])
def test_the_librarys_detectors_teach_ours(
    kind: str,
    family: str,
    build: Callable[..., Detector],
    reached: Callable[..., set[str]],
    tmp_path: Path,
) -> None:
    outside = load(hugging_face_models.write(kind, tmp_path), PreprocessConfig(size=(64, 96)))
    teacher = ChosenClasses(outside, range(3), 20).eval()
    for name, options in OUTSIDE.items():
        student = build(seed=1, **FAMILIES[family]).train()
        moved = reached(name, student, teacher, **options)
        assert any(parameter.startswith("backbone.") for parameter in moved), name


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_stable_dino_trains_one_alone(
    family: str,
    build: Callable[..., Detector],
    method: Callable[..., Any],
    take_step: Callable[..., Any],
) -> None:
    student = build(seed=1, **FAMILIES[family]).train()
    tested = method("stable_dino", student, None)
    losses = tested.detection_losses(take_step(student, None, [tested]))
    grouped = {"groups/class", "groups_proposals/giou"} <= losses.keys()
    assert grouped == (family != "rt-detr")
    torch.stack(list(losses.values())).sum().backward()
    grads = [p.grad for n, p in student.named_parameters() if n.startswith("backbone.")]
    assert all(grad is None or grad.isfinite().all() for grad in grads)
    assert any(grad is not None and grad.any() for grad in grads)


def test_queries_are_compared_with_maps_of_their_width(
    build: Callable[..., Detector], method: Callable[..., Any]
) -> None:
    student, teacher = build(seed=1), build(seed=2, **RT_DETR)
    with pytest.raises(UserError, match="48 channels at its neck and its queries 32") as caught:
        method("detrdistill", student, teacher, on="neck")
    assert caught.value.code == "method-width"
    method("detrdistill", student, build(seed=2, **{**RT_DETR, "encoder.width": None}), on="neck")


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
