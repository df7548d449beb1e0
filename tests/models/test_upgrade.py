"""What the first release wrote is read as what it meant; ``format1/`` holds files of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from detr.config import DetectorConfig
from detr.errors import UserError
from detr.model_info import ModelInfo, read_model_info
from detr.models import load_model
from detr.presets import FAMILIES, preset
from detr.shipped import ASSETS
from detr.sidecar import SidecarError, read_sidecar
from detr.upgrade import MOVED, composed
from engines.bundle import BundleInfo

OLD = Path(__file__).parent / "format1"
PRESETS: dict[str, dict[str, Any]] = json.loads((OLD / "presets.json").read_text())
DETECTORS: dict[str, dict[str, Any]] = json.loads((OLD / "detectors.json").read_text())


# Families that the first release did not have.
LATER = {"dino-official-5scale", "stable-dino-5scale", "rtdetr", "rtdetrv2"} | {
    "rtdetrv2-discrete",
    "d-fine",
    "lwdetr",
    "deim-d-fine",
    "deim-rtdetrv2",
    "rfdetr",
    "deimv2",
    "mask-dino",
    "stable-mask-dino",
}


def test_every_family_has_an_old_file():
    families = set(FAMILIES) - LATER
    assert families <= set(DETECTORS)
    assert {f"{family}-r50" for family in families} <= set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_an_old_preset_is_todays(name):
    old, new = DetectorConfig.model_validate(composed(PRESETS[name])), preset(name, 7)
    # What the first release's recipes said beside the preset, and later presets say themselves.
    assert old.replace(**{"backbone.frozen_stages": new.backbone.frozen_stages}) == new


@pytest.mark.parametrize("name", DETECTORS)
def test_an_old_small_detector_is_todays(name, small_preset):
    family, changes = {
        "dino memory fusion": ("dino", {"encoder": {"layers": 2, "fusion": "dense"}}),
        "dab-detr random anchors": ("dab-detr", {"queries.random_centers": True}),
    }.get(name, (name, {}))
    config = DetectorConfig.model_validate(composed(DETECTORS[name]))
    assert config == small_preset(family, **changes)


def test_every_old_key_has_a_place_now():
    kept = {"num_classes", "backbone", "width", "dropout", "detections"}
    flat = next(iter(PRESETS.values()))
    assert flat.keys() - kept == MOVED.keys()


@pytest.mark.slow
def test_the_old_demo_teacher_is_the_shipped_one(tmp_path):
    weights = ASSETS / "demo-teacher.safetensors"
    old = tmp_path / "teacher.safetensors"
    old.write_bytes(weights.read_bytes())
    old.with_suffix(".json").write_text((OLD / "demo-teacher.json").read_text())
    detector, info = load_model(old)
    shipped, wanted = load_model(weights)
    assert info == wanted and info.format == 2
    assert json.loads(weights.with_suffix(".json").read_text())["format"] == 2
    images = torch.randn(1, 3, 96, 160, generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([[96.0, 160.0]])
    with torch.no_grad():
        for ours, theirs in zip(
            detector(images, sizes, sizes), shipped(images, sizes, sizes), strict=True
        ):
            assert torch.equal(ours, theirs)


def test_an_old_bundle_is_read():
    info = read_sidecar(OLD / "bundle.json", BundleInfo)
    assert info.format == info.model.format == 2
    assert info.model == read_model_info(OLD / "demo-teacher.json")
    again = BundleInfo.model_validate_json(info.model_dump_json())
    assert again == info


def test_a_newer_format_is_told_in_one_line(tmp_path):
    path = tmp_path / "model.json"
    path.write_text((OLD / "demo-teacher.json").read_text().replace('"format": 1', '"format": 3'))
    with pytest.raises(UserError, match="format: 3 is another release's; update") as caught:
        read_model_info(path)
    assert caught.value.code == "model-sidecar" and "\n" not in caught.value.message
    path.write_text((OLD / "bundle.json").read_text().replace('"format": 1', '"format": 3'))
    with pytest.raises(SidecarError, match="format: 3 is another release's; update"):
        read_sidecar(path, BundleInfo)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"quries": 5}, "detector.quries: no such key"),
        ({"attention": "sparse"}, "no such kind 'sparse'"),
        ({"denoising": 5}, "detector.queries.denoising: "),
        ({"queries": "many"}, "detector.queries.number: "),
    ],
)
def test_a_bad_old_file_is_told_in_one_line(tmp_path, changes, line):
    content = json.loads((OLD / "demo-teacher.json").read_text())
    content["detector"] |= changes
    path = tmp_path / "model.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"model\.json: ") as caught:
        read_model_info(path)
    assert line in caught.value.message and "\n" not in caught.value.message


def test_what_is_written_has_this_format():
    info = read_model_info(OLD / "demo-teacher.json")
    written = json.loads(info.model_dump_json())
    assert written["format"] == 2 and "attention" not in written["detector"]
    assert ModelInfo.model_validate(written) == info
