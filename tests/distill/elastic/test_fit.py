"""Bundles of every model of an elastic run, and the command that chooses among them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from detr.config import ClassMap
from detr.data.preprocess import PreprocessConfig
from detr.errors import GateError, UserError
from detr.model_info import ModelInfo, read_model_info
from detr.models import build_detector, save_model
from distill.elastic import fit
from distill.elastic.fit import choices_of, export_all, measure
from distill.recipe import Recipe, load_recipe

DATA = "kitti:scenes:val"
# Of drawn scenes.
NAMES = ("Car", "Van", "Truck", "Pedestrian", "Person_sitting", "Cyclist", "Tram")
CLASSES = ClassMap(names=NAMES, category_ids=tuple(range(1, len(NAMES) + 1)))


@pytest.fixture()
def run(tiny: Recipe, tmp_path: Path) -> Path:
    """A run directory of four models, as a training leaves it."""
    content = tiny.model_dump(mode="json")
    content["elastic"] = {"decoder_layers": [1, 2], "sizes": [[48, 96], [64, 128]]}
    recipe = Recipe.model_validate(content)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    torch.manual_seed(0)
    detector = build_detector(recipe.detector.for_classes(len(CLASSES)))
    info = ModelInfo(
        detector=detector.config,
        classes=CLASSES,
        preprocess=PreprocessConfig(size=(64, 128)),
        provenance={"ap": 0.5, "ap_student": 0.4, "step": 7},
    )
    save_model(folder / "model.safetensors", detector, info)
    return folder


def test_every_model_is_exported_and_none_twice(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Sequence[str]] = []

    def call(command: Sequence[str]) -> None:
        asked.append(command)
        if "e1-d1-q12-48x96" in command[2]:
            raise GateError("export-parity", "finds other things")

    out = tmp_path / "out"
    bundles = export_all(run, DATA, out, call)
    names = [choice.name for choice in choices_of(run)]
    assert names == [f"e1-d{d}-q12-{size}" for d in (1, 2) for size in ("48x96", "64x128")]
    assert [bundle.stem for bundle in bundles] == names[1:]  # the gate rejects the first
    assert all(command[:2] == ["export", "onnx"] for command in asked)
    assert all(command[-2:] == ["--data", DATA] for command in asked)
    info = read_model_info(out / "models" / f"{names[0]}.json")
    assert info.detector.decoder.layers == 1 and info.preprocess.size == (48, 96)
    assert info.provenance["step"] == 7 and "ap_student" not in info.provenance
    monkeypatch.setattr(fit, "_made_of", lambda bundle, weights: bundle.stem != names[3])
    asked.clear()
    assert len(export_all(run, DATA, out, call)) == 4
    assert [Path(command[2]).stem for command in asked] == names[3:]


def test_a_run_of_which_nothing_passes_the_gate(run: Path, tmp_path: Path) -> None:
    def call(command: Sequence[str]) -> None:
        raise GateError("export-parity", "finds other things")

    with pytest.raises(UserError) as caught:
        export_all(run, DATA, tmp_path / "out", call)
    assert caught.value.code == "fit-rejected"


def test_a_run_of_one_model_is_refused(tiny: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run directory") as caught:
        choices_of(tmp_path)
    assert caught.value.code == "fit-run"
    (tmp_path / "recipe.yaml").write_text(tiny.to_yaml())
    with pytest.raises(UserError, match="holds one model"):
        choices_of(tmp_path)


def test_the_choice_is_the_measuring_rooms(tmp_path: Path) -> None:
    asked: list[Sequence[str]] = []

    def call(command: Sequence[str]) -> int:
        asked.append(command)
        return 3

    with pytest.raises(SystemExit) as caught:
        measure([tmp_path / "a.bundle"], tmp_path, {"--budget-ms": "20"}, True, call)
    assert caught.value.code == 3
    wanted = ["bench", "fit", str(tmp_path / "a.bundle"), "--out", str(tmp_path)]
    assert asked == [[*wanted, "--budget-ms", "20", "--json"]]


@pytest.mark.slow
def test_from_a_run_to_a_choice(
    run: Path, scenes: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    two = load_recipe(run / "recipe.yaml").replace(elastic={"sizes": [[64, 128]]})
    (run / "recipe.yaml").write_text(two.to_yaml())
    out, data = tmp_path / "out", f"kitti:{scenes}:val"
    bundles = export_all(run, data, out)
    options = {"--budget-ms": "10000", "--engine": "onnxruntime", "--data": data}
    measure(bundles, out, {**options, "--iterations": "10"}, True)
    told = json.loads(capfd.readouterr().out)
    assert len(bundles) == 2
    assert {one["name"] for one in told["candidates"]} == {bundle.stem for bundle in bundles}
    assert told["kept"] in {bundle.stem for bundle in bundles}
    before = [bundle.stat().st_mtime_ns for bundle in bundles]
    assert export_all(run, data, out) == bundles
    assert [bundle.stat().st_mtime_ns for bundle in bundles] == before
