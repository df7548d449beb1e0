"""Labels of any content: no traceback, and one answer in checking, training and scoring.

``DETR_FUZZ=10000`` sets the number of inputs per format.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from detr.data import Dataset, inspect, open_dataset
from detr.data.coco_document import coco_ground_truth
from detr.errors import UserError
from tests.fuzzing import FUZZ, NUMBER, changed, row_of

SIZE = (100, 60)

COCO: dict[str, Any] = {
    "images": [
        {"id": 1, "file_name": "a.png", "width": 100, "height": 60},
        {"id": "b", "file_name": "b.png", "width": 100, "height": 60},
    ],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 6, 20, 30], "area": 600.0},
        {"id": 2, "image_id": "b", "category_id": 2, "bbox": [9, 9, 9, 9], "iscrowd": 1},
        {"id": 3, "image_id": "b", "category_id": 2, "bbox": [90, 9, 30, 9], "iscrowd": 0},
    ],
    "categories": [{"id": 1, "name": "car"}, {"id": 2, "name": "person", "supercategory": "x"}],
}
MASKS: dict[str, Any] = {
    **COCO,
    "annotations": [
        {**COCO["annotations"][0], "segmentation": [[5, 6, 25, 6, 25, 36], [6, 7, 9, 7, 9, 30]]},
        {**COCO["annotations"][2], "segmentation": {"size": [60, 100], "counts": [5409, 9, 582]}},
        {**COCO["annotations"][1], "segmentation": {"size": [60, 100], "counts": "o03TkT1"}},
    ],
}
BDD = [
    {"name": "a.png", "labels": [
        {"category": "car", "box2d": {"x1": 1, "y1": 2, "x2": 30, "y2": 40},
         "attributes": {"crowd": False}},
        {"category": "other person", "box2d": {"x1": 1, "y1": 2, "x2": 30, "y2": 40}},
    ]},
    {"name": "b.png", "labels": None},
]  # fmt: skip
ROW = [
    "Car",
    "0.1",
    "1",
    "-1.57",
    "10",
    "20",
    "30.5",
    "40",
    *["1.5", "1.6", "3.9", "1", "1.6", "20", "0.1"],
]
YOLO_ROW = ["0", "0.5", "0.5", "0.25", "0.5"]
XML = (
    "<annotation><size><width>100</width><height>60</height></size><object><name>car</name>"
    "<difficult>0</difficult><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>30</xmax><ymax>40</ymax>"
    "</bndbox></object></annotation>"
)


@pytest.fixture(scope="module")
def root() -> Any:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for place in ("training/image_2", "images/val", "val2017", "JPEGImages"):
            (folder / place).mkdir(parents=True)
            for stem in "ab":
                Image.new("RGB", SIZE).save(folder / place / f"{stem}.png")
        for place in ("training/label_2", "labels/val", "annotations", "Annotations"):
            (folder / place).mkdir(parents=True)
        (folder / "data.yaml").write_text("val: images/val\nnames: [car, person]\n")
        yield folder


def one_answer(open_it: Callable[[], Dataset], masks: bool = False) -> None:
    """A UserError or one count of objects, whoever counts."""
    try:
        dataset = open_it()
    except UserError as error:
        assert "\n" not in error.message
        return
    found = inspect(dataset, masks=masks)
    for finding in found.findings:
        assert "\n" not in finding.message
    if not len(dataset):
        assert found.errors
        return
    stopped = []
    for work in (
        lambda: sum(learned(dataset, i, masks) for i in range(len(dataset))),
        lambda: sum(not a["iscrowd"] for a in coco_ground_truth(dataset, masks)["annotations"]),
    ):
        try:
            assert work() == found.objects
            stopped.append(False)
        except UserError:
            stopped.append(True)
    labels = {e.code for e in found.errors} - {"no-ground-truth", "image-size", "image-missing"}
    assert stopped == [bool(labels)] * 2, found.errors


def learned(dataset: Dataset, i: int, masks: bool) -> int:
    """Objects of an image, those whose masks have no pixel too."""
    if not masks:
        return len(dataset.labels(i).boxes)
    labels, warnings = dataset.labels_with_masks(i), dataset.scan_with_masks(i).warnings
    assert labels.masks is not None and len(labels.masks) == len(labels.boxes)
    assert all(mask.rle(dataset.image_size(i)).area for mask in labels.masks)
    return len(labels.boxes) + sum(w.code == "mask-empty" for w in warnings)


@pytest.mark.slow
@FUZZ
@given(draw=st.data())
def test_masks(root: Path, draw: st.DataObject) -> None:
    document = copy.deepcopy(MASKS)
    for row in draw.draw(st.lists(st.sampled_from(document["annotations"]), min_size=1)):
        row["segmentation"] = changed({"of": row["segmentation"]}, draw).get("of")
    path = root / "annotations/instances_val2017.json"
    path.write_text(json.dumps(document), errors="surrogatepass")
    one_answer(lambda: open_dataset(f"coco:{root}:val"), masks=True)


@pytest.mark.slow
@FUZZ
@given(draw=st.data())
def test_coco(root: Path, draw: st.DataObject) -> None:
    path = root / "annotations/instances_val2017.json"
    path.write_text(json.dumps(changed(COCO, draw)), errors="surrogatepass")
    one_answer(lambda: open_dataset(f"coco:{root}:val"))


@FUZZ
@given(draw=st.data())
def test_bdd100k(root: Path, draw: st.DataObject) -> None:
    path = root / "labels/det_val.json"
    path.write_text(json.dumps(changed(BDD, draw)), errors="surrogatepass")
    one_answer(lambda: open_dataset(f"bdd100k:{root}:val"))


@FUZZ
@given(draw=st.data())
def test_kitti(root: Path, draw: st.DataObject) -> None:
    for stem in "ab":
        rows = [row_of(draw, ROW, ["Van", "DontCare", "cow"]) for _ in range(3)]
        path = root / f"training/label_2/{stem}.txt"
        path.write_text("\n".join(rows), encoding="utf-8", errors="replace")
    one_answer(lambda: open_dataset(f"kitti:{root}"))


@FUZZ
@given(draw=st.data())
def test_yolo(root: Path, draw: st.DataObject) -> None:
    (root / "labels/val").mkdir(parents=True, exist_ok=True)
    for stem in "ab":
        rows = [row_of(draw, YOLO_ROW, ["1", "2", "0.3"]) for _ in range(3)]
        path = root / f"labels/val/{stem}.txt"
        path.write_text("\n".join(rows), encoding="utf-8", errors="replace")
    one_answer(lambda: open_dataset(f"yolo:{root}"))


@FUZZ
@given(draw=st.data())
def test_voc(root: Path, draw: st.DataObject) -> None:
    for stem in "ab":
        text = XML
        for _ in range(draw.draw(st.integers(0, 3))):
            at = draw.draw(st.integers(0, len(text)))
            value = draw.draw(st.one_of(NUMBER.map(repr), st.text(max_size=4)))
            text = text[:at] + value + text[at + draw.draw(st.integers(0, 9)) :]
        path = root / f"Annotations/{stem}.xml"
        path.write_text(text, encoding="utf-8", errors="replace")
    one_answer(lambda: open_dataset(f"voc:{root}"))
