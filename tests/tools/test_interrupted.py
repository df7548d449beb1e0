"""A training that is killed, or whose disk fills up, ends with the weights of an undisturbed one.

A few moments each; ``python -m tools.interrupted`` takes more.
"""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
import torch

from detr.data.synth import generate
from distill.recipe import Recipe
from tools import interrupted
from tools.interrupted import begin, differences, kill_once, small_recipe, status_of, steps_done

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    scenes = tmp_path_factory.mktemp("data") / "scenes"
    generate(scenes, images=10, size=interrupted.SIZE, seed=3, format="kitti")
    torch.set_num_threads(1)
    return small_recipe(scenes)


@pytest.fixture(scope="module")
def undisturbed(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert status_of(begin(recipe, run)) == 0
    return run


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_same_weights(
    recipe: Recipe, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    kills = 0
    # Each call gets a little farther, whatever the speed of the machine.
    for seconds in (0.2, 0.6, 1.0, 1.5, 2.0):
        kills += kill_once(recipe, run, seconds) is not None
    assert kills
    assert status_of(begin(recipe, run)) == 0
    assert differences(run, undisturbed, recipe) == []


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_a_full_disk_costs_nothing_that_was_there(
    recipe: Recipe, undisturbed: Path, tmp_path: Path, share: float
) -> None:
    # A limit on the size of a file stands for the disk: the write fails in the middle.
    run = tmp_path / "run"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    most = (undisturbed / "checkpoints/last.pt").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * most), limits[1]))
    try:
        assert status_of(begin(recipe, run)) == 28
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert steps_done(run, recipe) == 0
    assert status_of(begin(recipe, run)) == 0
    assert differences(run, undisturbed, recipe) == []


def test_a_difference_is_seen(tmp_path: Path) -> None:
    assert interrupted._equal({"a": torch.ones(2)}, {"a": torch.ones(2)})
    assert not interrupted._equal({"a": torch.ones(2)}, {"a": torch.tensor([1.0, 2.0])})
    assert not interrupted._equal([1], [1, 2])
