from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detr.config import ClassMap
from detr.data import open_dataset
from detr.data.coco_document import coco_ground_truth
from detr.data.formats.kitti import KITTI_CLASSES, KittiDataset
from detr.data.kitti_rows import read_label_file
from detr.errors import UserError

TAIL = "1.5 1.6 3.9 1.0 1.6 20.0 0.1"
CAR = f"Car 0.10 1 -1.57 10.00 20.00 30.50 40.00 {TAIL}"
REGION = "DontCare -1 -1 -10 1 2 5 6 -1 -1 -1 -1000 -1000 -1000 -10"

Maker = Callable[[dict[str, str]], Path]


@pytest.fixture
def kitti(tmp_path: Path) -> Maker:
    """Makes a KITTI folder from frame -> label text."""

    def make(frames: dict[str, str]) -> Path:
        for folder in ("image_2", "label_2"):
            (tmp_path / "training" / folder).mkdir(parents=True)
        for stem, text in frames.items():
            Image.new("RGB", (100, 60)).save(tmp_path / "training" / "image_2" / f"{stem}.png")
            (tmp_path / "training" / "label_2" / f"{stem}.txt").write_text(text)
        return tmp_path

    return make


def code_of(call: Callable[[], object]) -> tuple[str, str]:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in caught.value.message
    return caught.value.code, caught.value.message


def test_rows_are_read_as_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "000007.txt"
    path.write_text(f"{CAR}\n\n{CAR} 0.75\n")
    first, second = read_label_file(path)
    assert (first.type, first.truncated, first.occluded, first.alpha) == ("Car", 0.1, 1, -1.57)
    assert first.box == (10, 20, 30.5, 40) and first.score is None and first.line == 1
    assert second.score == 0.75 and second.line == 3


@pytest.mark.parametrize(
    ("row", "code", "says"),
    [
        (CAR.rsplit(" ", 1)[0], "kitti-label-columns", "14 columns"),
        (f"{CAR} 0.5 0.5", "kitti-label-columns", "17 columns"),
        (CAR.replace("30.50", "3o.50"), "kitti-label-value", "column 7 is '3o.50'"),
        (CAR.replace("30.50", "nan"), "kitti-label-value", "column 7"),
    ],
)
def test_a_bad_row_names_file_and_line(tmp_path: Path, row: str, code: str, says: str) -> None:
    path = tmp_path / "000007.txt"
    path.write_text(f"{CAR}\n{row}\n")
    found, message = code_of(lambda: read_label_file(path))
    assert found == code and says in message and f"{path}:2:" in message


def test_a_binary_label_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "000007.txt"
    path.write_bytes(b"\xff\xfe\x00\x81")
    assert code_of(lambda: read_label_file(path))[0] == "label-unreadable"


def test_labels_regions_and_empty_boxes(kitti: Maker) -> None:
    misc, flat = CAR.replace("Car", "Misc"), CAR.replace("30.50", "10.00")
    root = kitti({"000003": f"{CAR}\n{REGION}\n{misc}\n{flat}\n"})
    data = open_dataset(f"kitti:{root}")
    labels = data.labels(0)
    assert data.classes == KITTI_CLASSES and data.image_id(0) == 3
    assert labels.boxes.tolist() == [[10, 20, 30.5, 40]] and labels.labels.tolist() == [0]
    assert labels.ignore.tolist() == [[1, 2, 5, 6], [10, 20, 30.5, 40]]
    assert labels.ignore_labels.tolist() == [-1, -1]
    assert data.labels(0) is labels  # cached


def test_an_empty_label_file_is_an_image_without_objects(kitti: Maker) -> None:
    labels = open_dataset(f"kitti:{kitti({'000000': ''})}").labels(0)
    assert labels.boxes.shape == (0, 4) and labels.ignore.shape == (0, 4)
    assert labels.labels.dtype == np.int64 and labels.boxes.dtype == np.float32


def test_names_are_mapped_onto_the_given_classes_by_name(kitti: Maker) -> None:
    root = kitti({"000000": f"{CAR}\n{CAR.replace('Car', 'Van')}\n"})
    other = ClassMap(names=("Van", "Car"), category_ids=(5, 9))
    data = open_dataset(f"kitti:{root}", other)
    assert data.labels(0).labels.tolist() == [1, 0] and data.classes == other
    cars = open_dataset(f"kitti:{root}", ClassMap(names=("Car",), category_ids=(1,)))
    code, message = code_of(lambda: cars.labels(0))
    assert code == "class-not-in-map" and "000000.txt:2:" in message and "'Van'" in message


def test_files_from_windows_read_like_any_other(kitti: Maker) -> None:
    root = kitti({"000000": "", "000001": ""})
    (root / "ImageSets").mkdir()
    marked = "\ufeff".encode()
    (root / "ImageSets/val.txt").write_bytes(marked + b"000000\r\n000001\r\n")
    label = root / "training/label_2/000000.txt"
    label.write_bytes(marked + CAR.encode() + b"\r\n" + CAR.encode() + b"\r\n")
    data = open_dataset(f"kitti:{root}:val")
    assert len(data) == 2 and data.labels(0).labels.tolist() == [0, 0]
    (root / "ImageSets/val.txt").write_bytes(b"\xff\xfe0")
    code, message = code_of(lambda: open_dataset(f"kitti:{root}:val"))
    assert code == "split-row" and "not a text file" in message


def test_yaml_merges_and_ignores(kitti: Maker) -> None:
    rows = [CAR, *(CAR.replace("Car", name) for name in ("Van", "Truck", "Tram", "Misc"))]
    root = kitti({"000000": "\n".join(rows)})
    spec = root / "data.yaml"
    spec.write_text(
        "format: kitti\npath: .\nclasses: {Vehicle: [Car, Van], Big: [Truck]}\nignore: [Tram]\n"
    )
    data = open_dataset(str(spec))
    assert data.classes.names == ("Vehicle", "Big") and data.classes.category_ids == (1, 2)
    assert data.labels(0).labels.tolist() == [0, 0, 1] and len(data.labels(0).ignore) == 2
    spec.write_text("format: kitti\npath: .\nclasses: {Car: [Car]}\nignore: ['*']\n")
    assert len(open_dataset(str(spec)).labels(0).ignore) == 4


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("format: kitti\npath: .\nclases: {}\n", "clases"),
        ("format: vocc\npath: .\n", "format 'vocc' is none of kitti, coco"),
        ("path: .\n", "format is missing; it is one of kitti, coco"),
        ("format: kitti\npath: .\nclasses: {A: [Car], B: [Car]}\n", "'Car' is in both"),
        ("format: kitti\npath: .\nclasses: {}\n", "empty"),
        ("format: [\n", "data.yaml"),
        ("", "its keys are format, path, split, classes, ignore"),
        ("format: kitti\npth: .\n", "pth: no such key"),
    ],
)
def test_a_bad_yaml_names_the_key(kitti: Maker, text: str, says: str) -> None:
    spec = kitti({"000000": ""}) / "data.yaml"
    spec.write_text(text)
    code, message = code_of(lambda: open_dataset(str(spec)))
    assert code == "data-yaml" and says in message and "data.yaml" in message


def test_splits(kitti: Maker) -> None:
    root = kitti({f"{i:06d}": "" for i in range(4)})
    (root / "ImageSets").mkdir()
    (root / "ImageSets" / "val.txt").write_text("000003\n000001\n")
    data = open_dataset(f"kitti:{root}:val")
    assert [data.image_id(i) for i in range(len(data))] == [3, 1]
    assert len(open_dataset(f"kitti:{root}")) == 4
    code, message = code_of(lambda: open_dataset(f"kitti:{root}:tset"))
    assert code == "split-missing" and "there are: val" in message
    (root / "ImageSets" / "val.txt").write_text("000003\n000003\n")
    code, message = code_of(lambda: open_dataset(f"kitti:{root}:val"))
    assert code == "split-row" and "val.txt:2:" in message


def test_labels_alone_are_enough_to_score(kitti: Maker) -> None:
    root = kitti({"000005": f"{CAR}\n{REGION}\n"})
    (root / "training" / "image_2" / "000005.png").unlink()
    (root / "training" / "image_2").rmdir()
    data = open_dataset(f"kitti:{root}")
    assert len(data.labels(0).boxes) == 1
    truth = coco_ground_truth(data)
    crowds = [a for a in truth["annotations"] if a["iscrowd"]]
    assert truth["images"] == [{"id": 5}] and len(crowds) == len(KITTI_CLASSES)
    assert truth["annotations"][0]["bbox"] == [10, 20, 20.5, 20]
    assert truth["annotations"][0]["area"] == pytest.approx(410)


@pytest.mark.parametrize(
    ("spec", "code"),
    [
        ("kitti:", "data-spec"),
        ("vocc:/tmp", "data-spec"),
        ("/tmp", "data-spec"),
        ("kitti:/nowhere/at/all:val", "data-missing"),
        ("coco:/nowhere/at/all", "data-missing"),
        ("/nowhere/data.yaml", "data-missing"),
    ],
)
def test_a_bad_spec_is_told(spec: str, code: str) -> None:
    assert code_of(lambda: open_dataset(spec))[0] == code


def test_real_frames(shared_data: Path) -> None:
    data = open_dataset(f"kitti:{shared_data / 'kitti_tiny'}")
    assert isinstance(data, KittiDataset) and len(data) == 75
    assert data.image(0).shape[:2] == data.image_size(0)
    assert sum(len(data.labels(i).boxes) for i in range(75)) == 308
