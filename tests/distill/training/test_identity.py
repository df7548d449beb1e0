"""What binds a run that goes on, and what does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from detr.errors import UserError
from detr.model_info import read_model_info
from distill.recipe import Recipe
from distill.training import loop
from distill.training.identity import AHEAD, FREE, PLACES
from distill.training.loop import train
from distill.training.run_dir import RunDir


class Stopped(Exception):
    """Stands for the power supply."""


def changed(recipe: Recipe, **changes: Any) -> Recipe:
    return Recipe.model_validate(recipe.replace(**changes).model_dump())


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stopped")


@pytest.fixture
def begun(tiny: Recipe, stopped: Path, tmp_path: Path) -> Path:
    """A run that died in its fifth step of six, with a checkpoint of three."""
    kept = stopped / "run"
    if not kept.exists():
        with pytest.MonkeyPatch.context() as patch:
            stop_in(4, patch)
            with pytest.raises(Stopped):
                train(tiny, kept)
    shutil.copytree(kept, tmp_path / "run")
    return tmp_path / "run"


def stop_in(step: int, patch: pytest.MonkeyPatch) -> None:
    whole = loop.train_step

    def stopping(state: Any, batch: Any, index: int) -> dict[str, float]:
        if index == step:
            raise Stopped
        return whole(state, batch, index)

    patch.setattr(loop, "train_step", stopping)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("straight")


@pytest.fixture
def undisturbed(tiny: Recipe, straight: Path) -> dict[str, torch.Tensor]:
    """The weights of a run that nothing happened to."""
    if not (straight / "model.safetensors").exists():
        train(tiny, straight)
    return weights(straight)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": tensor
        for name in ("model", "student")
        for key, tensor in load_file(run / f"{name}.safetensors").items()
    }


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_every_key_that_is_named_exists(tiny: Recipe) -> None:
    known = tiny.model_dump()
    for key in (*FREE, *AHEAD, *PLACES):
        at: Any = known
        for part in key.split("."):
            assert part in at, key
            at = at[part]


@pytest.mark.slow
def test_keys_that_change_no_weight_bind_nobody(
    tiny: Recipe, begun: Path, undisturbed: dict[str, torch.Tensor], scenes: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "moved"
    shutil.copytree(scenes, copy)
    other = changed(
        tiny,
        name="other",
        data={"train": f"kitti:{copy}:train", "val": None},
        workers=3,
        checkpoint_every=1,
        validation={"every": 2, "images": 1},
    )
    train(other, begun)
    assert same(weights(begun), undisturbed)
    assert f"{copy}" in (begun / "recipe.yaml").read_text()
    assert not (begun / "changes.jsonl").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"batch_size": 4},
        {"optimizer": {"weight_decay": 0.1}},
        {"optimizer": {"lr": 2e-3}},
        {"augment": {"flip": 0.1}},
        {"ema": 0.8},
        {"accumulate": 2},
        {"steps": 2},
    ],
)
def test_what_changes_weights_that_are_there_binds(
    tiny: Recipe, begun: Path, change: dict[str, Any]
) -> None:
    before = (begun / "recipe.yaml").read_bytes()
    with pytest.raises(UserError) as caught:
        train(changed(tiny, **change), begun)
    assert caught.value.code == "run-differs"
    (key,) = change
    assert key in caught.value.message and "\n" not in caught.value.message
    assert (begun / "recipe.yaml").read_bytes() == before


def test_other_data_bind_wherever_they_lie(
    tiny: Recipe, begun: Path, scenes: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "moved"
    shutil.copytree(scenes, copy)
    label = next((copy / "training/label_2").iterdir())
    label.write_text("Car 0 0 0 5 5 30 40 1.5 1.6 3.9 0 1.6 20 0\n")
    moved = {"data": {"train": f"kitti:{copy}:train", "val": f"kitti:{scenes}:val"}}
    with pytest.raises(UserError, match="is not what") as caught:
        train(changed(tiny, **moved), begun)
    assert caught.value.code == "run-differs"
    (begun / "sources.json").unlink()  # of a run that did not note what it began with
    with pytest.raises(UserError, match=r"data\.train="):
        train(changed(tiny, **moved), begun)


@pytest.mark.slow
def test_a_longer_run_and_a_lower_rate_are_noted(tiny: Recipe, begun: Path) -> None:
    # The rates of backbone and rest become two, and with them the optimizer's groups.
    train(changed(tiny, steps=8, optimizer={"lr": 5e-4}), begun)
    facts = read_model_info(begun / "model.json").provenance
    assert facts["step"] == 8
    assert [(c["step"], c["key"], c["now"]) for c in facts["changes"]] == [
        (3, "optimizer.lr", 5e-4),
        (3, "steps", 8),
    ]
    assert "from step 3 on: optimizer.lr 0.001 -> 0.0005" in (begun / "log.txt").read_text()
    rows = [json.loads(line) for line in (begun / "metrics.jsonl").open()]
    assert rows[0]["lr"] < 5.01e-4 and {row["step"] for row in rows} == {8}
    train(changed(tiny, steps=10, optimizer={"lr": 5e-4}), begun)
    assert read_model_info(begun / "model.json").provenance["step"] == 10


@pytest.mark.slow
def test_labels_that_were_mended_are_noted(tiny: Recipe, begun: Path, scenes: Path) -> None:
    sources = begun / "sources.json"
    sources.write_text(json.dumps({**json.loads(sources.read_text()), "data": "0" * 64}))
    train(tiny, begun)
    (change,) = read_model_info(begun / "model.json").provenance["changes"]
    assert change["key"] == f"content of kitti:{scenes}:train" and change["before"] == "0" * 64


@pytest.mark.slow
def test_the_teacher_binds_by_its_weights(tiny: Recipe, tmp_path: Path) -> None:
    short = changed(tiny, steps=1, data={"val": None})
    for name, seed in (("teacher", 0), ("another", 1)):
        train(changed(short, seed=seed), tmp_path / name)
    student = changed(
        tiny, steps=2, teacher=str(tmp_path / "teacher"), methods=["fitnet"], data={"val": None}
    )
    run = tmp_path / "student"
    train(student, run)
    longer = changed(student, steps=3)
    with pytest.raises(UserError, match="has other weights") as caught:
        train(changed(longer, teacher=str(tmp_path / "another")), run)
    assert caught.value.code == "run-differs"
    (tmp_path / "teacher").rename(tmp_path / "elsewhere")
    train(changed(longer, teacher=str(tmp_path / "elsewhere")), run)
    assert read_model_info(run / "model.json").provenance["step"] == 3


@pytest.mark.slow
def test_the_model_is_saved_before_it_is_measured(
    tiny: Recipe, undisturbed: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise UserError("image-unreadable", "a.png: broken")

    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "measure_ap", broken)
        with pytest.raises(UserError, match=r"a.png"):
            train(tiny, run)
    assert same(weights(run), undisturbed)
    assert read_model_info(run / "model.json").provenance["step"] == 6
    # The same command measures what is there; without data to measure on there is nothing to do.
    train(changed(tiny, data={"val": None}), run)
    assert "nothing to do" in (run / "log.txt").read_text()
    before = (run / "model.safetensors").read_bytes()
    train(tiny, run)
    assert (run / "model.safetensors").read_bytes() == before
    assert "ap" in read_model_info(run / "model.json").provenance


def test_a_run_of_another_release_says_so_in_one_line(tiny: Recipe, begun: Path) -> None:
    frozen = begun / "recipe.yaml"
    # The first release described a detector by one flat table.
    flat = "detector: {levels: 4, heads: 4, encoder_layers: 3}\n"
    frozen.write_text(f"name: tiny\ndata: {{train: x}}\n{flat}steps: 6\n")
    with pytest.raises(UserError) as caught:
        train(tiny, begun)
    assert caught.value.code == "run-differs" and "\n" not in caught.value.message
    assert "cannot go on, its recipe is none of this release" in caught.value.message
    assert f"{frozen}:3: detector.levels is now detector.neck.levels" in caught.value.message


def test_other_methods_are_told_by_name(tiny: Recipe, begun: Path) -> None:
    other = tiny.replace(teacher="x", methods=[{"qskd": {}}])
    with pytest.raises(UserError, match="methods=none, now asked for qskd"):
        RunDir(begun, other)


def test_a_folder_of_something_else_is_no_run(tiny: Recipe, scenes: Path, tmp_path: Path) -> None:
    before = sorted(path.name for path in scenes.iterdir())
    with pytest.raises(UserError, match="is no run") as caught:
        RunDir(scenes, tiny)
    assert caught.value.code == "output-exists"
    assert sorted(path.name for path in scenes.iterdir()) == before
    (tmp_path / "slurm.log").write_text("begun")
    RunDir(tmp_path, tiny)
    assert (tmp_path / "recipe.yaml").exists()
