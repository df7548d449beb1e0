from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from detr.data.check import check
from detr.data.cli import data, parse_size
from detr.data.formats.base import FileDataset
from detr.data.open import open_dataset
from detr.errors import UserError

ROW = "Car 0 0 -1.57 {} 1.5 1.6 3.9 1.0 1.6 20.0 0.1"


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A KITTI folder with one of each fault."""
    pictures, labels = tmp_path / "training" / "image_2", tmp_path / "training" / "label_2"
    pictures.mkdir(parents=True)
    labels.mkdir()
    for i in range(5):
        Image.effect_noise((100, 60), 80).convert("RGB").save(pictures / f"{i:06d}.jpg")
    good = ROW.format("10 10 50 42")
    (labels / "000000.txt").write_text(
        "\n".join(
            [
                good,
                good.rsplit(" ", 1)[0],
                good.replace("Car", "Bus"),
                ROW.format("10 10 10 42"),
                ROW.format("110 10 150 42"),
                ROW.format("80 10 150 42"),
            ]
        )
    )
    (labels / "000001.txt").write_text("")
    (labels / "000002.txt").write_text(good)
    (labels / "000009.txt").write_text(good)  # has no image
    (labels / "000004.txt").write_text(good)
    cut = pictures / "000002.jpg"  # 000003 has no labels
    cut.write_bytes(cut.read_bytes()[:1500])
    return tmp_path


def test_every_fault_is_listed_with_its_place(broken: Path) -> None:
    dataset = open_dataset(f"kitti:{broken}")
    assert isinstance(dataset, FileDataset)
    report = check(dataset)
    found = [(p.severity, p.code, p.message) for p in report.findings]
    wanted = [
        ("error", "image-missing", "000009.txt"),
        ("error", "kitti-label-columns", "000000.txt:2:"),
        ("error", "class-not-in-map", "000000.txt:3:"),
        ("warning", "box-empty", "000000.txt:4:"),
        ("error", "box-outside", "000000.txt:5:"),
        ("warning", "box-over-border", "000000.txt:6:"),
        ("error", "image-unreadable", "000002.jpg"),
        ("error", "label-missing", "000003.txt"),
    ]
    assert len(found) == len(wanted)
    for severity, code, place in wanted:
        assert any(s == severity and c == code and place in m for s, c, m in found), (code, found)
    assert len(report.errors) == 6 and report.images == 5 and report.unlabeled == 2
    cars = report.classes[0]
    assert (cars.name, cars.objects, cars.images) == ("Car", 4, 3)
    assert report.sizes == {"small": 0, "medium": 4, "large": 0} and report.heights == {32: 4}


def test_the_command_prints_all_and_fails_in_one_line(broken: Path) -> None:
    run = CliRunner().invoke(data, ["check", f"kitti:{broken}", "--json"])
    assert run.exit_code == 2
    assert len(json.loads(run.stdout)["findings"]) == 8
    assert run.stderr.splitlines()[-1].startswith("error[data-check]: ")
    text = CliRunner().invoke(data, ["check", f"kitti:{broken}"]).stdout
    assert "[image-unreadable]" in text and "Car █" in text and "6 errors, 2 warnings" in text


def test_coco_faults(tmp_path: Path) -> None:
    (tmp_path / "val2017").mkdir()
    (tmp_path / "annotations").mkdir()
    Image.new("RGB", (80, 60)).save(tmp_path / "val2017" / "a.jpg")
    box = {"category_id": 1, "bbox": [1, 1, 5, 5], "area": 25, "iscrowd": 0}
    document = {
        "categories": [{"id": 1, "name": "cat"}],
        "images": [
            {"id": 1, "file_name": "a.jpg", "height": 80, "width": 60},
            {"id": 2, "file_name": "b.jpg", "height": 60, "width": 80},
        ],
        "annotations": [
            {"id": 1, "image_id": 1, **box},
            {"id": 1, "image_id": 1, **box},
            {"id": 2, "image_id": 7, **box},
            {"id": 3, "image_id": 1, **box, "category_id": 5},
        ],
    }
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(document))
    dataset = open_dataset(f"coco:{tmp_path}:val")
    assert isinstance(dataset, FileDataset)
    codes = sorted(p.code for p in check(dataset).findings)
    assert codes == [
        "category-unknown",
        "coco-annotation",
        "coco-orphan",
        "image-missing",
        "image-size",
    ]


def test_real_frames_are_clean(shared_data: Path) -> None:
    dataset = open_dataset(f"kitti:{shared_data / 'kitti_tiny'}")
    assert isinstance(dataset, FileDataset)
    report = check(dataset)
    assert report.findings == [] and report.objects == 308
    assert sum(report.sizes.values()) == sum(report.heights.values()) == 308


def test_synth_command(tmp_path: Path) -> None:
    out = tmp_path / "s"
    arguments = ["synth", str(out), "--images", "2", "--size", "64x208", "--seed", "3"]
    assert CliRunner().invoke(data, arguments).exit_code == 0
    assert Image.open(out / "training" / "image_2" / "000001.png").size == (208, 64)
    clash = CliRunner().invoke(data, [*arguments[:-1], "4"])
    assert clash.exit_code == 2 and "error[output-exists]" in clash.stderr


@pytest.mark.parametrize("text", ["128", "128*416", "x416", "-1x4", "128x416x3"])
def test_a_size_that_is_none(text: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_size(text)
    assert caught.value.code == "size-form"


def test_a_set_in_which_nothing_is_an_object_is_an_error(broken: Path, tmp_path: Path) -> None:
    spec = tmp_path / "data.yaml"
    spec.write_text(f"format: kitti\npath: {broken}\nclasses: {{Auto: [Carr]}}\nignore: ['*']\n")
    dataset = open_dataset(str(spec))
    assert isinstance(dataset, FileDataset)
    last = check(dataset).findings[-1]
    assert (last.severity, last.code) == ("error", "no-ground-truth") and "Auto" in last.message
