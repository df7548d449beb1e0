"""Every shipped recipe loads, freezes and builds, teachers and methods included."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from detr.errors import UserError
from detr.models import Detector, build_detector
from distill.methods import build_methods
from distill.recipe import find_recipe, load_recipe, shipped


@functools.cache
def built(name: str) -> Detector:
    """The detector of a recipe, without memory for its weights."""
    recipe = load_recipe(find_recipe(name))
    with torch.device("meta"):
        return build_detector(recipe.detector.for_classes(7), pretrained=False)


@pytest.mark.parametrize("name", sorted(shipped()))
def test_every_recipe_loads_freezes_and_builds(name: str, tmp_path: Path) -> None:
    path = find_recipe(name)
    recipe = load_recipe(path)
    assert recipe.name == name
    assert path.read_text().startswith("# ") and len(path.read_text().splitlines()[0]) <= 105
    frozen = tmp_path / "recipe.yaml"
    frozen.write_text(recipe.to_yaml())
    assert load_recipe(frozen) == recipe
    if not recipe.methods:
        assert recipe.teacher is None
        return
    student, teacher = built(name), None
    if recipe.teacher is not None:
        teacher = built(Path(recipe.teacher).name)
        assert teacher.config.width == student.config.width
    elif not recipe.needs_teacher and recipe.ema is not None:
        teacher = built(name)
    with torch.device("meta"):
        methods = build_methods(recipe.methods, student, teacher, loss=recipe.loss)
    assert [m.name for m in methods] == [name for entry in recipe.methods for name in entry]
    if any(m.teacher == "ema" for m in methods):
        assert recipe.ema is not None and not recipe.ema_rising


@pytest.mark.parametrize("name", sorted(shipped()))
def test_overrides_in_a_recipes_comments_are_valid(name: str) -> None:
    path = find_recipe(name)
    for line in path.read_text().splitlines():
        words = line.split()
        if line.startswith("#") and "--set" in words:
            load_recipe(path, [words[i + 1] for i, word in enumerate(words) if word == "--set"])


def test_a_base_is_merged_key_by_key(tmp_path: Path) -> None:
    (tmp_path / "below.yaml").write_text(
        "name: below\ndata: {train: 'kitti:a:train', val: 'kitti:a:val'}\n"
        "input: {size: [64, 128]}\ndetector: {queries: 10, heads: 4}\nsteps: 5\n"
    )
    path = tmp_path / "above.yaml"
    path.write_text(
        "name: above\nbase: below\ndata: {train: 'kitti:b:train'}\ndetector: {heads: 2}\n"
    )
    recipe = load_recipe(path)
    assert (recipe.data.train, recipe.data.val) == ("kitti:b:train", "kitti:a:val")
    assert (recipe.detector.queries, recipe.detector.heads, recipe.steps) == (10, 2, 5)
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
