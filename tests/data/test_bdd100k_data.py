"""BDD100K's label files: its classes, its ignore attributes, and what is wrong with others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from detr.data import inspect, open_dataset
from detr.errors import UserError


def label(category: str = "car", **changes: Any) -> dict[str, Any]:
    box = {"x1": 10.5, "y1": 20.0, "x2": 59.0, "y2": 49.0}
    return {"id": "7", "category": category, "box2d": box, **changes}


def bdd(root: Path, *labels: Any, name: str = "det_20/det_val.json") -> Path:
    """One frame of 200 x 100 in the release's folders."""
    (root / "images/100k/val").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (200, 100)).save(root / "images/100k/val/b1c66a42.jpg")
    path = root / "labels" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([{"name": "b1c66a42.jpg", "labels": list(labels)}]))
    return root


def test_objects_regions_and_lanes(tmp_path: Path) -> None:
    root = bdd(
        tmp_path,
        label("traffic light", attributes={"occluded": True, "trafficLightColor": "green"}),
        label("person"),
        label("rider", attributes={"crowd": True}),
        label("other vehicle"),
        {"category": "drivable area", "poly2d": [{"vertices": [[1, 2]], "types": "L"}]},
    )
    data = open_dataset(f"bdd100k:{root}:val")
    assert len(data.classes) == 10 and data.classes.category_ids == tuple(range(1, 11))
    labels = data.labels(0)
    assert [data.classes.names[k] for k in labels.labels] == ["traffic light", "pedestrian"]
    assert labels.boxes[0].tolist() == [10.5, 20, 60, 50]  # the last pixel is part of a box
    assert [data.classes.names[k] for k in labels.ignore_labels] == ["rider", "car"]
    assert inspect(data).findings == [] and data.image_id(0) == "b1c66a42.jpg"


def test_a_category_the_user_names_goes_where_the_user_says(tmp_path: Path) -> None:
    bdd(tmp_path, label("trailer"), label("van"), label("bus"))
    spec = tmp_path / "d.yaml"
    spec.write_text(
        "format: bdd100k\npath: .\nsplit: val\nclasses: {big: [trailer, bus], small: [van]}\n"
    )
    data = open_dataset(str(spec))
    assert data.labels(0).labels.tolist() == [0, 1, 0] and len(data.labels(0).ignore) == 0
    spec.write_text("format: bdd100k\npath: .\nsplit: val\nignore: [trailer, bus]\n")
    assert len(open_dataset(str(spec)).labels(0).ignore) == 2


@pytest.mark.parametrize(
    ("row", "code", "says"),
    [
        (label("cow"), "class-not-in-map", "class 'cow'"),
        (label(category=3), "bdd100k-label", "category is 3, not text"),
        (label(box2d={"x1": 1, "y1": 2, "x2": "9"}), "bdd100k-label", 'x2 is "9", not a number'),
        (label(box2d=[1, 2, 3, 4]), "bdd100k-label", "box2d is [1, 2, 3, 4]"),
        (label(attributes={"crowd": "0"}), "bdd100k-label", 'crowd is "0", not 0 or 1'),
        (7, "bdd100k-label", "is no object"),
        (label(box2d={"x1": 300, "y1": 2, "x2": 310, "y2": 9}), "box-outside", "outside"),
    ],
)
def test_a_bad_label_names_frame_and_number(tmp_path: Path, row: Any, code: str, says: str) -> None:
    data = open_dataset(f"bdd100k:{bdd(tmp_path, label(), row)}")
    with pytest.raises(UserError) as caught:
        data.labels(0)
    assert caught.value.code == code and says in caught.value.message
    assert "det_val.json: b1c66a42.jpg: label 1" in caught.value.message


@pytest.mark.parametrize("text", ["{", "3", '{"frames": 3}', "[3]", '[{"name": 7}]'])
def test_what_is_no_label_file(tmp_path: Path, text: str) -> None:
    (bdd(tmp_path) / "labels/det_20/det_val.json").write_text(text)
    with pytest.raises(UserError) as caught:
        open_dataset(f"bdd100k:{tmp_path}")
    assert caught.value.code == "bdd100k-json" and "det_val.json" in caught.value.message


def test_either_release_and_free_places(tmp_path: Path) -> None:
    root = bdd(tmp_path / "a", label(), name="bdd100k_labels_images_val.json")
    assert len(open_dataset(f"bdd100k:{root}")) == 1
    with pytest.raises(UserError, match="no split 'train'; there are: val"):
        open_dataset(f"bdd100k:{root}:train")
    spec = tmp_path / "d.yaml"
    parts = "images: a/images/100k/val\nannotations: a/labels/bdd100k_labels_images_val.json\n"
    spec.write_text(f"format: bdd100k\n{parts}")
    assert inspect(open_dataset(str(spec))).findings == []


def test_frames_told_twice(tmp_path: Path) -> None:
    path = bdd(tmp_path) / "labels/det_20/det_val.json"
    frame = {"name": "b1c66a42.jpg", "labels": [label()]}
    path.write_text(json.dumps([frame, frame, {"name": "other.jpg"}]))
    data = open_dataset(f"bdd100k:{tmp_path}")
    assert "image-twice" in {error.code for error in inspect(data).errors} and len(data) == 1
