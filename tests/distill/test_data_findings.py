"""Labels of all splits are looked at before the first step."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from detr.errors import UserError
from detr.models import load_model
from distill.recipe import Recipe
from distill.training.loop import train
from engines.cli import predict

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


def test_objects_without_masks_stop_a_detector_with_masks(tiny: Recipe, tmp_path: Path) -> None:
    content = tiny.model_dump(mode="json")
    content["detector"]["heads"]["masks"] = {"width": 8, "channels": 8}
    run = tmp_path / "run"
    with pytest.raises(UserError) as caught:
        train(Recipe.model_validate(content), run)
    assert caught.value.code == "mask-missing"
    assert not (run / "metrics.jsonl").exists() and not (run / "checkpoints").exists()


def test_what_is_left_out_is_said_in_the_log(tiny: Recipe, scenes: Path, tmp_path: Path) -> None:
    car = FLAT.replace("9 5 9 20", "9 5 29 20")
    spec = spoilt(scenes, tmp_path / "data", car + FLAT)
    recipe = tiny.model_copy(
        update={"data": tiny.data.model_copy(update={"train": spec}), "steps": 1}
    )
    train(recipe, tmp_path / "run")
    assert "10 warnings (box-empty 10)" in (tmp_path / "run/log.txt").read_text()


def test_more_objects_than_queries_are_said_before_the_first_step(
    tiny: Recipe, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    car = FLAT.replace("9 5 9 20", "9 5 29 20")
    spec = spoilt(scenes, tmp_path / "data", car * 15)
    data = {"train": spec, "val": None}
    recipe = Recipe.model_validate({**tiny.model_dump(), "data": data, "steps": 1})
    train(recipe, tmp_path / "run")
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "has 15 objects" in x]
    assert line == f"{spec}: an image has 15 objects, the detector finds at most 12 " + (
        "(detector.queries.number)"
    )
    assert line in (tmp_path / "run/log.txt").read_text()


def test_batch_norm_over_a_single_value(tiny: Recipe, scenes: Path, tmp_path: Path) -> None:
    small = tiny.replace(input={"size": [32, 32]}, batch_size=2, accumulate=2)
    with pytest.raises(UserError, match=r"input.size: 32x32 is one cell") as caught:
        train(Recipe.model_validate(small.model_dump()), tmp_path / "run")
    assert caught.value.code == "recipe-value"
    enough = small.replace(accumulate=1, steps=1, data={"val": None})
    train(Recipe.model_validate(enough.model_dump()), tmp_path / "run")


@pytest.mark.slow
def test_the_range_of_deep_images_goes_from_the_data_to_the_model(
    tiny: Recipe, scenes: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    (folder / "training/image_2").mkdir(parents=True)
    (folder / "training/label_2").symlink_to(scenes / "training/label_2")
    for path in (scenes / "training/image_2").iterdir():
        gray = np.asarray(Image.open(path).convert("L"), dtype=np.uint16)
        Image.fromarray(7000 + gray * 4).save(folder / "training/image_2" / path.name)
    (folder / "d.yaml").write_text("format: kitti\npath: .\nrange: [7000, 8020]\n")
    changes = {"data": {"train": str(folder / "d.yaml"), "val": f"kitti:{folder}"}, "steps": 1}
    recipe = Recipe.model_validate({**tiny.model_dump(), **changes})
    run = tmp_path / "run"
    train(recipe, run)
    detector, info = load_model(run)
    assert info.preprocess.range == (7000, 8020)
    # Gray scenes of 8 bits teach and measure the same.
    plain = tmp_path / "plain"
    (plain / "training/image_2").mkdir(parents=True)
    (plain / "training/label_2").symlink_to(scenes / "training/label_2")
    for path in (scenes / "training/image_2").iterdir():
        Image.open(path).convert("L").save(plain / "training/image_2" / path.name)
    changes["data"] = {"train": f"kitti:{plain}", "val": f"kitti:{plain}"}
    train(Recipe.model_validate({**tiny.model_dump(), **changes}), tmp_path / "eight")
    other, _ = load_model(tmp_path / "eight")
    ours, theirs = detector.state_dict(), other.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    deep, flat = (f / "training/image_2/000000.png" for f in (folder, plain))
    found = CliRunner().invoke(predict, [str(run), str(deep), "--score", "0", "--json"])
    assert found.exit_code == 0, found.output
    same = CliRunner().invoke(
        predict, [str(tmp_path / "eight"), str(flat), "--score", "0", "--json"]
    )
    boxes = [json.loads(out.stdout)["predictions"][0]["detections"] for out in (found, same)]
    assert boxes[0] == boxes[1] and boxes[0]
    with pytest.raises(UserError, match="has 8 bits, but a range of 7000 to 8020"):
        CliRunner().invoke(predict, [str(run), str(flat)], catch_exceptions=False)
    changes["input"] = {**tiny.input.model_dump(), "range": [0, 255]}
    changes["data"] = {"train": str(folder / "d.yaml")}
    with pytest.raises(UserError, match=r"input.range: \[0.0, 255.0\], but .* \[7000.0, 8020.0\]"):
        train(Recipe.model_validate({**tiny.model_dump(), **changes}), tmp_path / "two")
