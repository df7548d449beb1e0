"""Every shipped recipe loads, freezes and builds, teachers and methods included."""

from __future__ import annotations

import functools
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from detr.config import DetectorConfig
from detr.errors import UserError
from detr.models import Detector, build_detector
from detr.presets import preset
from distill.methods import Method, build_methods
from distill.recipe import Recipe, find_recipe, load_recipe, shipped


@functools.cache
def _built(detector: str) -> Detector:
    with torch.device("meta"):
        return build_detector(DetectorConfig.model_validate_json(detector), pretrained=False)


def built(recipe: Recipe) -> Detector:
    """A recipe's detector without memory for its weights."""
    return _built(recipe.detector.for_classes(7).model_dump_json())


@functools.cache
def loaded(name: str) -> Recipe:
    """A shipped recipe as it is."""
    return load_recipe(find_recipe(name))


def teacher_of(recipe: Recipe) -> Detector | None:
    """What a recipe's methods learn from; ``runs/NAME`` is what the recipe NAME trains."""
    if recipe.teacher is not None:
        return built(loaded(Path(recipe.teacher).name))
    average = recipe.ema is not None and not recipe.needs_teacher
    return built(recipe) if average else None


def methods_of(recipe: Recipe) -> list[Method]:
    """A recipe's methods, beside student and teacher."""
    student, teacher = built(recipe), teacher_of(recipe)
    with torch.device("meta"):
        return build_methods(recipe.methods, student, teacher, loss=recipe.loss)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(shipped()))
def test_every_recipe_loads_freezes_and_builds(name: str, tmp_path: Path) -> None:
    path = find_recipe(name)
    recipe = load_recipe(path)
    assert recipe.name == name
    assert path.read_text().startswith("# ") and len(path.read_text().splitlines()[0]) <= 105
    frozen = tmp_path / "recipe.yaml"
    frozen.write_text(recipe.to_yaml())
    assert load_recipe(frozen) == recipe
    methods = methods_of(recipe)
    assert [m.name for m in methods] == [name for entry in recipe.methods for name in entry]
    if not recipe.methods:
        assert recipe.teacher is None
    elif recipe.teacher is not None:
        assert teacher_of(recipe).config.width == recipe.detector.width  # type: ignore[union-attr]
    if any(m.teacher == "ema" for m in methods):
        assert recipe.ema is not None and not recipe.ema_rising


def written(name: str) -> list[dict[str, Any]]:
    """The ``detector`` sections of a recipe and of those it builds on, the recipe's first."""
    content = yaml.safe_load(find_recipe(name).read_text())
    below = written(content["base"]) if "base" in content else []
    return [content.get("detector", {}), *below]


def leaves(content: dict[str, Any], key: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """The values of a nested mapping by their whole key."""
    found: dict[tuple[str, ...], Any] = {}
    for name, value in content.items():
        inner = leaves(value, (*key, name)) if isinstance(value, dict) else {(*key, name): value}
        found |= inner
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(shipped()))
def test_every_detector_is_its_preset_and_what_the_recipe_says(name: str) -> None:
    sections = written(name)
    names = [section["preset"] for section in sections if "preset" in section]
    assert names, "no preset"
    before = leaves(preset(names[0], 7).model_dump(mode="json"))
    after = leaves(loaded(name).detector.for_classes(7).model_dump(mode="json"))
    told: dict[tuple[str, ...], Any] = {}
    for section in reversed(sections):
        told |= leaves({key: value for key, value in section.items() if key != "preset"})
    assert after == before | told
    # Nothing is said twice: each line changes the preset, or what the recipe below said.
    below: dict[tuple[str, ...], Any] = {}
    for section in reversed(sections[1:]):
        below |= leaves({key: value for key, value in section.items() if key != "preset"})
    own = leaves({key: value for key, value in sections[0].items() if key != "preset"})
    assert [key for key, value in own.items() if {**before, **below}.get(key) == value] == []


def ablations() -> list[tuple[str, str]]:
    """Recipe and comment line, wherever a comment changes the recipe."""
    return [
        (name, line)
        for name, path in sorted(shipped().items())
        for line in path.read_text().splitlines()
        if line.startswith("#") and ": --set " in line
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "line"), ablations())
def test_every_ablation_builds_as_typed(name: str, line: str) -> None:
    words = shlex.split(line.partition(": --set ")[2])
    changes = words[::2]
    assert set(words[1::2]) <= {"--set"}, "only overrides may follow the colon"
    recipe = load_recipe(find_recipe(name), changes)
    assert recipe != loaded(name), "the line changes nothing"
    methods_of(recipe)


@pytest.mark.parametrize("name", [name for name in shipped() if name.startswith("coco-")])
def test_norms_and_biases_decay_as_in_the_released_code(name: str) -> None:
    # Stable-DINO is built on detrex, which decays no norms, and neither do RT-DETR's and D-FINE's
    # code, nor Mask DINO's; LW-DETR's decays those of the decoder alone, which is more than any
    # recipe can say; all other decays everything.
    without = ("stable", "rtdetr", "dfine", "mask-dino", "lwdetr", "rfdetr", "deimv2")
    decays = not any(part in name for part in without)
    assert loaded(name).optimizer.decay_norms_and_biases == decays


def test_no_ablation_hides_behind_another_form() -> None:
    listed = set(ablations())
    for name, path in shipped().items():
        for line in path.read_text().splitlines():
            if line.startswith("#") and "--set" in line and "detr distill" not in line:
                assert (name, line) in listed, line


def test_a_base_is_merged_key_by_key(tmp_path: Path) -> None:
    (tmp_path / "below.yaml").write_text(
        "name: below\ndata: {train: 'kitti:a:train', val: 'kitti:a:val'}\n"
        "input: {size: [64, 128]}\nsteps: 5\n"
        "detector: {queries: {number: 10}, attention_heads: 4}\n"
    )
    path = tmp_path / "above.yaml"
    path.write_text(
        "name: above\nbase: below\ndata: {train: 'kitti:b:train'}\ndetector: {attention_heads: 2}\n"
    )
    recipe = load_recipe(path)
    assert (recipe.data.train, recipe.data.val) == ("kitti:b:train", "kitti:a:val")
    detector = recipe.detector
    assert (detector.queries.number, detector.attention_heads, recipe.steps) == (10, 2, 5)
    path.write_text("name: above\nbase: below\ndetector: {headz: 2}\n")
    with pytest.raises(UserError, match=r"above.yaml:3: no such key 'detector.headz'"):
        load_recipe(path)
    (tmp_path / "below.yaml").write_text("base: above\n")
    with pytest.raises(UserError, match="builds on itself"):
        load_recipe(path)
    path.write_text("base: nothing-of-this-name\n")
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    assert caught.value.code == "recipe-missing"
