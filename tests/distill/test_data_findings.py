"""Labels of all splits are looked at before the first step."""

from __future__ import annotations

from pathlib import Path

import pytest

from detr.errors import UserError
from distill.recipe import Recipe
from distill.training.loop import train

REGION = "DontCare -1 -1 -10 0 0 9 9 -1 -1 -1 -1000 -1000 -1000 -10\n"
OUTSIDE = "Car 0 0 0 900 5 950 20 1.5 1.6 3.9 0 1.6 20 0\n"
FLAT = "Car 0 0 0 9 5 9 20 1.5 1.6 3.9 0 1.6 20 0\n"


def spoilt(scenes: Path, folder: Path, text: str) -> str:
    """The validation scenes with other labels, as a set of their own."""
    (folder / "training").mkdir(parents=True)
    (folder / "training/image_2").symlink_to(scenes / "training/image_2")
    (folder / "training/label_2").mkdir()
    for path in (scenes / "training/label_2").iterdir():
        (folder / "training/label_2" / path.name).write_text(text)
    return f"kitti:{folder}"


@pytest.mark.parametrize(("text", "code"), [(REGION, "no-ground-truth"), (OUTSIDE, "box-outside")])
@pytest.mark.parametrize("split", ["train", "val"])
def test_bad_labels_of_either_split_stop_a_run_before_its_first_step(
    tiny: Recipe, scenes: Path, tmp_path: Path, split: str, text: str, code: str
) -> None:
    spec = spoilt(scenes, tmp_path / "data", text)
    data = tiny.data.model_copy(update={split: spec})
    run = tmp_path / "run"
    with pytest.raises(UserError) as caught:
        train(tiny.model_copy(update={"data": data}), run)
    assert caught.value.code == code
    assert not (run / "metrics.jsonl").exists() and not (run / "checkpoints").exists()


def test_what_is_left_out_is_said_in_the_log(tiny: Recipe, scenes: Path, tmp_path: Path) -> None:
    car = FLAT.replace("9 5 9 20", "9 5 29 20")
    spec = spoilt(scenes, tmp_path / "data", car + FLAT)
    recipe = tiny.model_copy(
        update={"data": tiny.data.model_copy(update={"train": spec}), "steps": 1}
    )
    train(recipe, tmp_path / "run")
    assert "10 warnings (box-empty 10)" in (tmp_path / "run/log.txt").read_text()
