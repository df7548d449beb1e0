"""Every field of a recipe, of every part and method: a value is refused in one line, or it works.

``DETR_FUZZ=10000`` sets the number of recipes. Fields are found in the models, so that a new one
is tried by itself.
"""

from __future__ import annotations

import copy
import json
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from torch import nn

from detr.config import DetectorConfig
from detr.data.dataset import Labels
from detr.data.preprocess import preprocess
from detr.errors import UserError
from detr.models import build_detector
from detr.presets import FAMILIES
from distill.data.augment import augment
from distill.distributed import join
from distill.elastic.choices import ElasticRecipe
from distill.methods import METHODS, parse_methods
from distill.recipe import Recipe, load_recipe
from distill.training.accumulate import images_per_process
from distill.training.optim import build_optimizer, rate, set_rate
from tests.fuzzing import FUZZ as MANY

# Families whose sizes have no ResNet.
VITS = {"lwdetr": "vit", "rfdetr": "dinov2"}
FUZZ = settings(MANY, max_examples=max(300, MANY.max_examples))
WILD: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3, 7, 16, 0.5, -0.5, 1.5, 1e-300, 1e-9, 1e308, -1e308,
    float("inf"), float("nan"), 2**31, 2**63, 2**70, -(2**63), "", "x", "1", "no", "a\0b", "é/..",
    [], [0], [1, 2], [1.5, 0.8], [2, 1], [-1, -1], [0, 0, 0], [float("nan")] * 3, [1e-300] * 3,
    [16, 16], [17, 31], [[]], [None], {}, {"a": 1}, {"kind": "x"}, {1: 2}, ["x", "x"],
]  # fmt: skip


def models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from models(inner)


def reachable(model: type[BaseModel]) -> set[type[BaseModel]]:
    found = {model}
    for field in model.model_fields.values():
        for inner in models(field.annotation):
            if inner not in found:
                found |= reachable(inner)
    return found


def leaves(value: BaseModel, place: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The places of all fields, those of models within them included."""
    for name in type(value).model_fields:
        yield (*place, name)
        inner = getattr(value, name)
        if isinstance(inner, BaseModel):
            yield from leaves(inner, (*place, name))


def kinds_of(value: BaseModel) -> set[type[BaseModel]]:
    found = {type(value)}
    for name in type(value).model_fields:
        inner = getattr(value, name)
        if isinstance(inner, BaseModel):
            found |= kinds_of(inner)
    return found


@pytest.fixture(scope="module")
def bases(small_preset: Callable[..., DetectorConfig]) -> list[Recipe]:
    """Small recipes that have, between them, every part there is."""
    found = []
    for family in FAMILIES:
        detector = small_preset(family).model_dump()
        backbone = {"name": "test_resnet", "strides": detector["backbone"]["strides"]}
        if family in VITS:
            backbone = {"kind": VITS[family], "width": 24, "heads": 4, "side": 3, "taps": [1, 2]}
            detector["neck"] = {"kind": "projector", "blocks": 1}
        found.append(
            Recipe.model_validate(
                {
                    "name": family,
                    "data": {"train": "kitti:data"},
                    "input": {"size": [32, 64], "short": 32, "long": 64},
                    "detector": {**detector, "backbone": backbone, "num_classes": 0},
                    "steps": 3,
                    "batch_size": 2,
                    "teacher": "runs/x",
                    "inherit": True,
                    "augment": {"multi_scale": True}
                    if len(found) % 2
                    else {"mosaic": {}, "mixup": {}},
                }
            )
        )
    deimv2 = next(base for base in found if base.name == "deimv2").model_dump()
    dinov3 = {"kind": "dinov3", "width": 24, "heads": 3, "taps": [1, 2, 3], "ffn": 8, "detail": 4}
    lite = {**deimv2["detector"]["encoder"], "kind": "lite", "layers": 0}
    for part in ({"backbone": dinov3}, {"encoder": lite}):
        found.append(Recipe.model_validate({**deimv2, "detector": {**deimv2["detector"], **part}}))
    return [*found, found[0].model_copy(update={"elastic": ElasticRecipe(drawn=2)})]


def test_the_bases_have_every_part(bases: list[Recipe]) -> None:
    every = set().union(*(kinds_of(base) for base in bases))
    assert reachable(Recipe) - every == set()


def works(recipe: Recipe) -> None:
    """What training does with a recipe before its first step, and to an image."""
    images_per_process(recipe, join())
    parse_methods(recipe.methods)
    config = recipe.detector.for_classes(recipe.detector.num_classes or 3)
    detector = build_detector(config, pretrained=False)
    optimizer = build_optimizer(detector, nn.ModuleList(), recipe.optimizer)
    set_rate(optimizer, rate(0, recipe.steps, recipe.optimizer))
    image = np.full((24, 40, 3), 99, dtype=np.uint8)
    labels = Labels(
        boxes=np.array([[2, 3, 30, 20]], dtype=np.float32),
        labels=np.array([0]),
        ignore=np.array([[0, 0, 3, 3]], dtype=np.float32),
        ignore_labels=np.array([-1]),
    )
    view, seen = augment(image, labels, recipe.input, recipe.augment, np.random.default_rng(0))
    assert min(view.shape) > 0 and np.isfinite(seen.boxes).all()
    assert np.isfinite(preprocess([image], recipe.input).images).all()


def refused_in_one_line(work: Callable[[], Any]) -> bool:
    try:
        work()
    except UserError as error:
        assert "\n" not in error.message and len(error.message) < 1000
        return True
    return False


@pytest.mark.slow
@FUZZ
@given(draw=st.data())
def test_any_value_anywhere(
    bases: list[Recipe], tmp_path_factory: Any, draw: st.DataObject
) -> None:
    base = draw.draw(st.sampled_from(bases))
    content = base.model_dump(mode="json")
    places = []
    for _ in range(draw.draw(st.integers(1, 2))):
        place = draw.draw(st.sampled_from(list(leaves(base))))
        value = draw.draw(st.one_of(st.sampled_from(WILD), st.floats(), st.integers(-4, 40)))
        at: Any = content
        for part in place[:-1]:
            at = at[part] if isinstance(at, dict) and part in at else {}
        if isinstance(at, dict):
            at[place[-1]] = copy.deepcopy(value)
        places.append(place)
    path: Path = tmp_path_factory.getbasetemp() / "wild.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True))
    refused_in_one_line(lambda: works(load_recipe(path)))


@FUZZ
@given(draw=st.data())
def test_any_option_of_a_method(draw: st.DataObject) -> None:
    name = draw.draw(st.sampled_from(list(METHODS)))
    fields = list(METHODS[name].Options.model_fields)
    if fields:
        option = draw.draw(st.sampled_from(fields))
        value = draw.draw(st.one_of(st.sampled_from(WILD), st.floats(), st.integers()))
        refused_in_one_line(lambda: parse_methods([{name: {option: value}}]))


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("augment.zoom", [1.5, 0.8], "zoom: 1.5 is more than 0.8"),
        ("augment.zoom", [0, 1], "augment.zoom.0: Input should be greater than or equal to 0.01"),
        ("input.mean", [1, 2], "input.mean.2: Field required"),
        ("input.std", [1, 0, 1], "input.std.1: Input should be greater than"),
        ("input.size", [8, 8], "input.size.0: Input should be greater than or equal to 16"),
        ("optimizer.lr", -1, "optimizer.lr: Input should be greater than or equal to 0"),
        ("optimizer.lr", float("nan"), "optimizer.lr: Input should be a finite number"),
        ("steps", 0, "steps: Input should be greater than or equal to 1"),
        ("steps", True, "steps is true, not a number"),
        ("loss.giou", -2, "loss.giou: Input should be greater than or equal to 0"),
        ("detector.width", 2**31, "detector.width: Input should be less than or equal to 8192"),
        ("name", "../up", "name: '../up' is a path and no name"),
    ],
)
def test_a_bad_value_is_told_with_its_key_and_place(
    bases: list[Recipe], tmp_path: Path, key: str, value: Any, says: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(bases[0].to_yaml())
    override = f"{key}={json.dumps(value).replace('NaN', '.nan')}"
    with pytest.raises(UserError) as caught:
        load_recipe(path, (override,))
    assert caught.value.code == "recipe-value" and says in caught.value.message
    # Of what is told of a whole part, the file and the part's line.
    assert override in caught.value.message or f"{path}:" in caught.value.message
