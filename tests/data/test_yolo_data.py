"""YOLO folders as Ultralytics, CVAT and Roboflow write them, and what is wrong with others."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from detr.data import inspect, open_dataset
from detr.errors import UserError

NAMES = "names: {0: car, 1: person}\n"
DATA_YAML = f"path: .\nval: images/val\n{NAMES}"


def yolo(root: Path, rows: dict[str, str | None], yaml: str = DATA_YAML) -> Path:
    """Pictures of 200 x 100 with label files; None leaves one out."""
    (root / "data.yaml").write_text(yaml)
    for stem, text in rows.items():
        for part in ("images", "labels"):
            (root / part / "val").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (200, 100)).save(root / "images/val" / f"{stem}.png")
        if text is not None:
            (root / "labels/val" / f"{stem}.txt").write_text(text)
    return root


def test_boxes_polygons_and_images_without_labels(tmp_path: Path) -> None:
    polygon = "1 0.1 0.2 0.5 0.2 0.5 0.6 0.3 0.9\n"
    root = yolo(tmp_path, {"000012": f"0 0.5 0.5 0.25 0.5\n{polygon}", "left_7": None, "8": "\n"})
    data = open_dataset(f"yolo:{root}:val")
    assert data.classes.names == ("car", "person") and data.classes.category_ids == (1, 2)
    assert [data.image_id(i) for i in range(3)] == [12, 8, "left_7"]
    assert data.labels(0).boxes.tolist() == [[75, 25, 125, 75], [20, 20, 100, 90]]
    assert data.labels(0).labels.tolist() == [0, 1]
    assert len(data.labels(1).boxes) == len(data.labels(2).boxes) == 0
    found = inspect(data)
    assert found.findings == [] and found.objects == 2
    assert data.scan(0).annotations[1].where.endswith("labels/val/000012.txt:2")


@pytest.mark.parametrize(
    ("row", "code", "says"),
    [
        ("0 0.5 0.5 0.25", "yolo-label-columns", "4 columns, expected 5"),
        ("0 0.5 0.5 0.25 0.5 0.9", "yolo-label-columns", "6 columns"),
        ("0 0.5 o.5 0.25 0.5", "yolo-label-value", "column 3 is 'o.5'"),
        ("0 0.5 nan 0.25 0.5", "yolo-label-value", "column 3 is 'nan'"),
        ("0 320 240 40 50", "yolo-label-value", "column 2 is 320, not relative"),
        ("2 0.5 0.5 0.25 0.5", "category-unknown", "class 2 is none of 0 to 1"),
        ("0.5 0.5 0.5 0.25 0.5", "category-unknown", "class 0.5"),
        ("car 0.5 0.5 0.25 0.5", "yolo-label-value", "column 1 is 'car'"),
        ("0 0.5 0.5 -0.25 0.5", "box-inverted", "negative size"),
    ],
)
def test_a_bad_row_names_file_and_line(tmp_path: Path, row: str, code: str, says: str) -> None:
    root = yolo(tmp_path, {"a": f"0 0.5 0.5 0.2 0.2\n{row}\n"})
    data = open_dataset(f"yolo:{root}")
    with pytest.raises(UserError) as caught:
        data.labels(0)
    assert caught.value.code == code and says in caught.value.message
    assert "labels/val/a.txt:2:" in caught.value.message
    assert inspect(data).errors[0].code == code


def test_keypoints_are_left_aside(tmp_path: Path) -> None:
    yaml = f"path: .\nval: images/val\nkpt_shape: [2, 3]\n{NAMES}"
    root = yolo(tmp_path, {"a": "0 0.5 0.5 0.5 0.5 0.1 0.1 2 0.2 0.2 2\n"}, yaml)
    assert open_dataset(f"yolo:{root}").labels(0).boxes.tolist() == [[50, 25, 150, 75]]


@pytest.mark.parametrize(
    ("yaml", "code", "says"),
    [
        ("val: images/val\n", "yolo-yaml", "names is missing"),
        ("val: images/val\nnames: [a, a]\n", "yolo-yaml", "a name appears twice"),
        ("val: images/val\nnames: {0: a, 2: b}\n", "yolo-yaml", "not 0, 1, 2"),
        ("val: images/val\nnc: 3\nnames: [a, b]\n", "yolo-yaml", "nc is 3, but there are 2"),
        ("val: [3]\nnames: [a]\n", "yolo-yaml", "val is [3]"),
        ("path: 3\nval: images/val\nnames: [a]\n", "yolo-yaml", "path is 3"),
        ("val: images/vaal\nnames: [a]\n", "data-missing", "images/vaal"),
        ("train: a\nval: b\nnames: [a]\n", "split-missing", "name a split; there are: train, val"),
        ("[", "data-yaml", "data.yaml"),
        ("- 3", "data-yaml", "its keys are path, train, val, test, names"),
    ],
)
def test_a_bad_data_yaml(tmp_path: Path, yaml: str, code: str, says: str) -> None:
    root = yolo(tmp_path, {"a": None}, yaml)
    with pytest.raises(UserError) as caught:
        open_dataset(f"yolo:{root / 'data.yaml'}")
    assert caught.value.code == code and says in caught.value.message


def test_lists_of_images_and_roboflow_s_relative_folder(tmp_path: Path) -> None:
    root = yolo(tmp_path, {"a": "0 0.5 0.5 0.5 0.5\n", "b": None, "c": None})
    (root / "val.txt").write_text("./images/val/c.png\nimages/val/a.png\nimages/val/a.png\n")
    (root / "data.yaml").write_text(f"val: val.txt\n{NAMES}")
    data = open_dataset(f"yolo:{root}")
    assert [data.image_path(i).stem for i in range(len(data))] == ["c", "a"]
    assert inspect(data).findings == []
    # Roboflow writes the path of a folder one level up, and puts the split's name first.
    (root / "valid/labels").mkdir(parents=True)
    (root / "images/val").rename(root / "valid/images")
    (root / "labels/val/a.txt").rename(root / "valid/labels/a.txt")
    (root / "data.yaml").write_text("val: ../valid/images\nnames: [car, person]\n")
    assert len(open_dataset(f"yolo:{root}:val").labels(0).boxes) == 1


def test_labels_in_another_folder_are_missed(tmp_path: Path) -> None:
    root = yolo(tmp_path, {"a": "0 0.5 0.5 0.5 0.5\n", "b": None})
    (root / "labels/val/b2.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (root / "labels/val/classes.txt").write_text("car\nperson\n")
    (error,) = inspect(open_dataset(f"yolo:{root}")).errors
    assert error.code == "image-missing" and "b2.txt: has no image" in error.message
    (root / "labels").rename(root / "label")
    with pytest.raises(UserError, match=r"none of 2 images has a label file"):
        inspect(open_dataset(f"yolo:{root}")).stop()


def test_a_data_yaml_in_place_of_ours_is_recognized(tmp_path: Path) -> None:
    root = yolo(tmp_path, {"a": None}, f"train: images/val\n{NAMES}")
    with pytest.raises(UserError, match=r"this looks like yolo:.*data.yaml"):
        open_dataset(str(root / "data.yaml"))
    wrapper = tmp_path / "mine.yaml"
    wrapper.write_text("format: yolo\npath: data.yaml\nclasses: {all: [car, person]}\n")
    assert open_dataset(str(wrapper)).classes.names == ("all",)


def test_without_its_picture_a_relative_box_means_nothing(tmp_path: Path) -> None:
    root = yolo(tmp_path, {"a": "0 0.5 0.5 0.5 0.5\n"})
    (root / "data.yaml").write_text(f"val: val.txt\n{NAMES}")
    (root / "val.txt").write_text("images/val/a.png\n")
    (root / "images/val/a.png").unlink()
    found = inspect(open_dataset(f"yolo:{root}"), pictures=False)
    assert [error.code for error in found.errors] == ["image-missing", "no-ground-truth"]


def test_polygons_are_masks_and_boxes_have_none(tmp_path: Path) -> None:
    square = "1 0.1 0.2 0.5 0.2 0.5 0.6 0.1 0.6\n"
    data = open_dataset(f"yolo:{yolo(tmp_path, {'a': square, 'b': square + '0 .5 .5 .2 .2'})}:val")
    labels = data.labels_with_masks(0)
    assert labels.boxes.tolist() == [[20, 20, 100, 60]] and labels.masks is not None
    pixels = labels.masks[0].rle((100, 200)).pixels()
    assert pixels[20:60, 20:100].all() and pixels.sum() == 40 * 80
    with pytest.raises(UserError, match=r"b\.txt:2: the object has no mask") as caught:
        data.labels_with_masks(1)
    assert caught.value.code == "mask-missing"
    assert [f.code for f in inspect(data, masks=True).errors] == ["mask-missing"]
    assert inspect(data).findings == []
