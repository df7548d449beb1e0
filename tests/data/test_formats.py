"""A data format from outside the package: the recipe of CONTRIBUTING.md, run as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from detr.data import open_dataset
from detr.data.cli import data
from detr.data.formats.registry import OURS
from detr.errors import UserError

RECIPE = (Path(__file__).resolve().parents[2] / "CONTRIBUTING.md").read_text()
CODE = re.search(r"`csv_boxes.py`.*?```python\n(.*?)```", RECIPE, re.S)
POINT = re.search(r'entry-points."detr_distillery.formats"]\n(.*?)\n```', RECIPE, re.S)


def plug_in(folder: Path, monkeypatch: pytest.MonkeyPatch, points: str, code: str) -> None:
    """What installing a package leaves in site-packages."""
    info = folder / "csv_boxes-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: csv-boxes\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(f"[detr_distillery.formats]\n{points}\n")
    (folder / "csv_boxes.py").write_text(code)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(__import__("sys").modules, "csv_boxes", raising=False)


@pytest.fixture
def boxes(tmp_path: Path) -> Path:
    folder = tmp_path / "boxes"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (80, 60)).save(folder / name)
    (folder / "boxes.csv").write_text(
        "file,class,x0,y0,x1,y1\na.png,cat,1,2,30,40\na.png,dog,5,5,20,20\nb.png,cat,5,5,x,20\n"
    )
    return folder


def test_the_recipe_of_a_data_format(
    boxes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert CODE is not None and POINT is not None
    plug_in(tmp_path, monkeypatch, POINT[1].replace('"', ""), CODE[1])
    dataset = open_dataset(f"csv:{boxes}")
    assert dataset.classes.names == ("cat", "dog") and dataset.image_id(0) == "a.png"
    assert dataset.labels(0).boxes.tolist() == [[1, 2, 30, 40], [5, 5, 20, 20]]
    (tmp_path / "d.yaml").write_text("format: csv\npath: boxes\nclasses: {pet: [cat, dog]}\n")
    assert open_dataset(str(tmp_path / "d.yaml")).labels(0).labels.tolist() == [0, 0]
    checked = CliRunner().invoke(data, ["check", f"csv:{boxes}"])
    assert checked.exit_code == 2 and "boxes.csv:4: could not convert" in checked.stdout
    with pytest.raises(UserError, match=r"kitti, coco.*, csv"):
        open_dataset("nothing:of:the:kind")


@pytest.mark.parametrize(
    ("point", "code", "says"),
    [
        ("csv = csv_boxes:CSV", "import absent_package", "ModuleNotFoundError"),
        ("csv = csv_boxes:CSV", "CSV = 3", "is no DataFormat called 'csv'"),
        ("kitti = csv_boxes:CSV", "CSV = 3", "'kitti' is offered by csv-boxes and is one of ours"),
    ],
)
def test_a_format_that_does_not_plug_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, code: str, says: str
) -> None:
    plug_in(tmp_path, monkeypatch, point, code)
    with pytest.raises(UserError, match=says) as caught:
        open_dataset(f"{point.split()[0]}:{tmp_path}")
    assert caught.value.code == "data-format" and "\n" not in caught.value.message


def test_the_docs_list_every_format_and_every_key_of_its_yaml() -> None:
    docs = (Path(__file__).resolve().parents[2] / "docs/data.md").read_text()
    for form in OURS:
        assert f"| `{form.name}:PATH[:SPLIT]` |" in docs
        for key in form.spec.model_fields:
            assert re.search(rf"^\| .*`{key}`.* \|", docs, re.M), (form.name, key)
    assert "coco, kitti, yolo, voc" in docs
    assert {form.name for form in OURS if form.write} == {"coco", "kitti", "yolo", "voc"}
