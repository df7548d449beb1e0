"""An image that cannot be read costs no run, and changes nothing about going on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from detr.data import open_dataset
from detr.errors import UserError
from distill.recipe import Recipe
from distill.training import loop
from distill.training.loop import train


def cut(path: Path) -> None:
    """Leaves the header and a third of the pixels."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 3])


@pytest.fixture
def images(scenes: Path, tmp_path: Path) -> list[Path]:
    """Eight to learn from, then two to measure on."""
    folder = tmp_path / "scenes"
    shutil.copytree(scenes, folder)
    splits = [open_dataset(f"kitti:{folder}:{split}") for split in ("train", "val")]
    return [split.image_path(i) for split in splits for i in range(len(split))]


def on(folder: Path, tiny: Recipe, **data: Any) -> Recipe:
    whole = {"train": f"kitti:{folder}:train", "val": f"kitti:{folder}:val", **data}
    return Recipe.model_validate({**tiny.model_dump(), "data": whole})


@pytest.mark.slow
def test_an_image_cut_off_is_said_listed_and_replaced(
    tiny: Recipe, images: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = [images[0], images[3], images[-1]]
    for path in broken:
        cut(path)
    recipe = on(tmp_path / "scenes", tiny)
    train(recipe, tmp_path / "straight")
    told = capsys.readouterr().err
    for path in broken:
        assert told.count(f"left out: {path}") == 1
    assert "; 3 images could not be read" in told.splitlines()[-1]
    listed = [json.loads(x) for x in (tmp_path / "straight/unreadable.jsonl").open()]
    assert sorted(row["image"] for row in listed) == sorted(map(str, broken))
    assert "on 1 images" in told  # of two

    whole = loop.train_step

    def stopping(state: Any, batch: Any, index: int) -> dict[str, float]:
        if index == 5:
            raise KeyboardInterrupt
        return whole(state, batch, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "stopped")
    train(recipe, tmp_path / "stopped")
    ours, theirs = (load_file(tmp_path / x / "model.safetensors") for x in ("straight", "stopped"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    rows = [json.loads(x)["image"] for x in (tmp_path / "stopped/unreadable.jsonl").open()]
    assert len(rows) == len(set(rows)) == 3


def test_a_limit_decides_when_to_stop(tiny: Recipe, images: list[Path], tmp_path: Path) -> None:
    for path in images[:4]:
        cut(path)
    recipe = on(tmp_path / "scenes", tiny, max_unreadable=1)
    for _ in range(2):  # a second try does not get round it
        with pytest.raises(UserError, match=r"2 images could not be read.*is 1") as caught:
            train(recipe, tmp_path / "run")
        assert caught.value.code == "images-unreadable"
    assert len((tmp_path / "run/unreadable.jsonl").read_text().splitlines()) == 2


def test_nothing_left_to_learn_from(tiny: Recipe, images: list[Path], tmp_path: Path) -> None:
    for path in images:
        cut(path)
    with pytest.raises(UserError) as caught:
        train(on(tmp_path / "scenes", tiny, val=None), tmp_path / "run")
    assert caught.value.code == "image-unreadable" and str(images[0].parent) in str(caught.value)


@pytest.mark.slow
def test_nothing_left_to_measure_on_leaves_the_model(
    tiny: Recipe, images: list[Path], tmp_path: Path
) -> None:
    for path in images[-2:]:
        cut(path)
    with pytest.raises(UserError) as caught:
        train(on(tmp_path / "scenes", tiny), tmp_path / "run")
    assert caught.value.code == "images-unreadable"
    assert (tmp_path / "run/model.safetensors").exists()
    train(on(tmp_path / "scenes", tiny, val=None), tmp_path / "run")
    assert "nothing to do" in (tmp_path / "run/log.txt").read_text()
