from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detr.config import ClassMap
from detr.data import open_dataset
from detr.data.coco_document import coco_ground_truth
from detr.errors import UserError

Maker = Callable[..., Path]

CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]


def annotation(number: int, category: int = 3, **changes: Any) -> dict[str, Any]:
    row = {
        "id": number,
        "image_id": 42,
        "category_id": category,
        "bbox": [1.0, 2.0, 10.0, 20.0],
        "area": 150.0,
        "iscrowd": 0,
    }
    return {**row, **changes}


@pytest.fixture
def coco(tmp_path: Path) -> Maker:
    """Makes a COCO folder with one image, id 42, 80 wide and 60 high."""

    def make(*annotations: dict[str, Any], split: str = "val") -> Path:
        (tmp_path / f"{split}2017").mkdir()
        (tmp_path / "annotations").mkdir(exist_ok=True)
        Image.new("RGB", (80, 60)).save(tmp_path / f"{split}2017" / "a.jpg")
        images = [{"id": 42, "file_name": "a.jpg", "height": 60, "width": 80}]
        document = {"images": images, "annotations": annotations, "categories": CATEGORIES}
        path = tmp_path / "annotations" / f"instances_{split}2017.json"
        path.write_text(json.dumps(document))
        return tmp_path

    return make


def code_of(call: Callable[[], object]) -> tuple[str, str]:
    with pytest.raises(UserError) as caught:
        call()
    return caught.value.code, caught.value.message


def test_category_ids_become_contiguous_and_are_kept(coco: Maker) -> None:
    data = open_dataset(f"coco:{coco(annotation(1, 7), annotation(2, 3))}:val")
    assert data.classes == ClassMap(names=("dog", "cat"), category_ids=(3, 7))
    assert data.labels(0).labels.tolist() == [1, 0]
    assert data.image_id(0) == 42 and data.image_size(0) == data.image(0).shape[:2] == (60, 80)


def test_crowds_are_regions_boxes_are_clipped_and_flat_ones_skipped(coco: Maker) -> None:
    data = open_dataset(
        "coco:"
        + str(
            coco(
                annotation(1, 7, iscrowd=1),
                annotation(2, bbox=[70, 50, 30, 30]),
                annotation(3, bbox=[5, 5, 0, 9]),
            )
        )
    )
    labels = data.labels(0)
    assert labels.ignore.tolist() == [[1, 2, 11, 22]] and labels.ignore_labels.tolist() == [1]
    assert labels.boxes.tolist() == [[70, 50, 80, 60]]


@pytest.mark.parametrize(
    ("row", "code", "says"),
    [
        (annotation(9, 4), "category-unknown", "category_id 4"),
        (annotation(9, bbox=[1, 2, 3]), "coco-annotation", "bbox"),
        (annotation(9, bbox=[1, 2, float("nan"), 3]), "coco-annotation", "not finite"),
        (annotation(9, category_id=None), "coco-annotation", "category_id is null"),
        (annotation(9, category_id=1.7), "coco-annotation", "category_id is 1.7, not a whole"),
        (annotation(9, category_id="dog"), "coco-annotation", 'category_id is "dog"'),
        (annotation(9, category_id=True), "coco-annotation", "category_id is true"),
        (annotation(9, bbox=["1", "2", "3", "4"]), "coco-annotation", "in numbers"),
        (annotation(9, iscrowd="0"), "coco-annotation", 'iscrowd is "0", not 0 or 1'),
        (annotation(9, iscrowd=2), "coco-annotation", "iscrowd is 2"),
        (annotation(9, area="150"), "coco-annotation", 'area is "150", not a number'),
        (annotation(9, bbox=[90, 5, 5, 5]), "box-outside", "outside the image (80x60)"),
        (annotation(9, bbox=[3, 5, 1e300, 5]), "box-outside", "outside any image"),
        (annotation(9, bbox=[30, 5, -5, 5]), "box-inverted", "negative size"),
    ],
)
def test_a_bad_annotation_is_named(coco: Maker, row: dict[str, Any], code: str, says: str) -> None:
    data = open_dataset(f"coco:{coco(annotation(1), row)}")
    found, message = code_of(lambda: data.labels(0))
    assert found == code and says in message and "annotation 9" in message
    assert "instances_val2017.json" in message


def test_given_classes_are_matched_by_name(coco: Maker) -> None:
    root = coco(annotation(1, 7))
    given = ClassMap(names=("bird", "cat"), category_ids=(16, 17))
    assert open_dataset(f"coco:{root}", given).labels(0).labels.tolist() == [1]
    dogs = open_dataset(f"coco:{root}", ClassMap(names=("dog",), category_ids=(3,)))
    code, message = code_of(lambda: dogs.labels(0))
    assert code == "class-not-in-map" and "annotation 1" in message and "'cat'" in message


def test_yaml_keeps_category_ids(coco: Maker) -> None:
    root = coco(annotation(1, 7), annotation(2, 3))
    (root / "d.yaml").write_text("format: coco\npath: .\nclasses: {cat: []}\nignore: ['*']\n")
    data = open_dataset(str(root / "d.yaml"))
    assert data.classes.category_ids == (7,) and data.labels(0).labels.tolist() == [0]
    assert data.labels(0).ignore_labels.tolist() == [-1]
    (root / "d.yaml").write_text("format: coco\npath: .\nclasses: {bird: [bird]}\n")
    assert code_of(lambda: open_dataset(str(root / "d.yaml")))[0] == "data-yaml"


def test_the_split_is_chosen_or_asked_for(coco: Maker) -> None:
    root = coco(annotation(1))
    assert len(open_dataset(f"coco:{root}")) == 1
    coco(annotation(1), split="train")
    code, message = code_of(lambda: open_dataset(f"coco:{root}"))
    assert code == "split-missing" and "train, val" in message
    assert open_dataset(f"coco:{root}:train").image_path(0).parent.name == "train2017"


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"images": [], "annotations": [{}]}'])
def test_what_is_no_coco_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "instances.json"
    path.write_text(text)
    code, message = code_of(lambda: open_dataset(f"coco:{path}"))
    assert code == "coco-json" and "instances.json" in message


def test_ground_truth_is_the_files_own(coco: Maker) -> None:
    rows = [annotation(1, bbox=[70, 50, 30, 30]), annotation(2, 7, iscrowd=1)]
    truth = coco_ground_truth(open_dataset(f"coco:{coco(*rows)}"))
    keys = ("image_id", "category_id", "bbox", "area", "iscrowd")
    assert [[a[k] for k in keys] for a in truth["annotations"]] == [
        [r[k] for k in keys] for r in rows
    ]


def test_eighty_real_classes(shared_data: Path) -> None:
    data = open_dataset(f"coco:{shared_data / 'coco_mini'}:val")
    assert len(data) == 94 and len(data.classes) == 80
    assert data.classes.names[0] == "person" and data.classes.category_ids[-1] == 90
    boxes = np.concatenate([data.labels(i).boxes for i in range(94)])
    assert len(boxes) == 846 and (boxes[:, 2:] > boxes[:, :2]).all()
    assert sum(len(data.labels(i).ignore) for i in range(94)) == 10
    assert data.image(0).shape[:2] == data.image_size(0)
