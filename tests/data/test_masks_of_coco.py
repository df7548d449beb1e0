"""Masks of COCO files: what is read, and what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from detr.data import inspect, open_dataset
from detr.data.check import check
from detr.data.dataset import Dataset
from detr.data.draw import draw
from detr.data.show import show
from detr.errors import UserError
from detr.masks import encode

Maker = Callable[..., Dataset]
SIZE = (60, 80)
SQUARE = [[10, 20, 30, 20, 30, 40, 10, 40]]


def square() -> np.ndarray[Any, np.dtype[np.bool_]]:
    pixels = np.zeros(SIZE, dtype=np.bool_)
    pixels[20:40, 10:30] = True
    return pixels


def packed(pixels: np.ndarray[Any, np.dtype[np.bool_]]) -> dict[str, Any]:
    coded = coco_mask.encode(np.asfortranarray(pixels.astype(np.uint8)))
    return {"size": list(SIZE), "counts": coded["counts"].decode()}


@pytest.fixture
def coco(tmp_path: Path) -> Maker:
    """Opens a COCO set of one image, 80 wide and 60 high, with objects of such segmentations."""

    def make(*rows: dict[str, Any], drop: tuple[str, ...] = ()) -> Dataset:
        Image.new("RGB", (SIZE[1], SIZE[0])).save(tmp_path / "a.png")
        usual = {"image_id": 1, "category_id": 1, "bbox": [10, 20, 20, 20], "iscrowd": 0}
        document = {
            "images": [{"id": 1, "file_name": "a.png", "height": SIZE[0], "width": SIZE[1]}],
            "annotations": [{**usual, "id": k, **row} for k, row in enumerate(rows, start=1)],
            "categories": [{"id": 1, "name": "cat"}],
        }
        (tmp_path / "a.json").write_text(json.dumps(document))
        drops = f"drop: [{', '.join(drops)}]\n" if (drops := drop) else ""
        (tmp_path / "d.yaml").write_text(f"format: coco\nannotations: a.json\n{drops}")
        return open_dataset(str(tmp_path / "d.yaml"))

    return make


@pytest.mark.parametrize(
    "told",
    [SQUARE, packed(square()), {"size": [60, 80], "counts": [620, *[20, 40] * 19, 20, 3020]}],
)
def test_all_three_forms(coco: Maker, told: Any) -> None:
    labels = coco({"segmentation": told}).labels_with_masks(0)
    assert labels.masks is not None and len(labels.masks) == 1
    assert np.array_equal(labels.masks[0].rle(SIZE).pixels(), square())


def test_crowds_keep_their_masks_and_are_no_objects(coco: Maker) -> None:
    crowd = {"segmentation": packed(square()), "iscrowd": 1}
    data = coco(crowd, {"segmentation": SQUARE})
    labels = data.labels_with_masks(0)
    assert len(labels.boxes) == len(labels.ignore) == 1 and len(labels.masks or ()) == 1
    mask = data.annotations(0)[0].mask
    assert mask is not None and mask().rle(SIZE).area == 400


@pytest.mark.parametrize(
    ("told", "code", "words"),
    [
        (None, "mask-missing", "no mask"),
        ([], "mask-missing", "no mask"),
        ([[1, 2, 3, 4]], "mask-format", "three corners"),
        ([[1, 2, 3, 4, 5, 6, 7]], "mask-format", "three corners"),
        ([1, 2, 3, 4, 5, 6], "mask-format", "polygon 0"),
        ([[1, 2, 3, 4, "5", 6]], "mask-format", '"5"'),
        ([[1, 2, 3, 4, 1e9, 6]], "mask-format", "within"),
        ([[1, 2, 3, 4, float("nan"), 6]], "mask-format", "NaN"),
        ("cat", "mask-format", "neither"),
        ({"size": [60, 80]}, "mask-format", "counts"),
        ({"size": [60, 80], "counts": [1, 2]}, "mask-format", "add up to 3"),
        ({"size": [60, 80], "counts": [4801, -1]}, "mask-format", "whole numbers"),
        ({"size": [60, 80], "counts": "PP"}, "mask-format", "too early"),
        ({"size": "60", "counts": "PP"}, "mask-format", "size"),
        ({"size": [80, 60], "counts": [4800]}, "mask-size", "60x80"),
        ([[100, 100, 120, 100, 120, 120]], "mask-outside", "80x60"),
    ],
)
def test_bad_masks_stop_who_wants_them_and_nobody_else(
    coco: Maker, told: Any, code: str, words: str
) -> None:
    rows: list[dict[str, Any]] = [{"segmentation": told}, {"segmentation": SQUARE}]
    data = coco(*rows)
    assert len(data.labels(0).boxes) == 2 and data.scan(0).errors == []
    with pytest.raises(UserError, match="annotation 1") as caught:
        data.labels_with_masks(0)
    assert caught.value.code == code and words in caught.value.message
    dropped = coco(*rows, drop=(code,))
    assert len(dropped.labels_with_masks(0).boxes) == 1
    assert len(dropped.labels_with_masks(0).masks or ()) == 1


def test_an_object_without_a_pixel_is_left_out(coco: Maker) -> None:
    data = coco({"segmentation": {"size": [60, 80], "counts": [4800]}}, {"segmentation": SQUARE})
    assert len(data.labels(0).boxes) == 2 and len(data.labels_with_masks(0).boxes) == 1
    assert [w.code for w in data.scan_with_masks(0).warnings] == ["mask-empty"]


@pytest.mark.parametrize(
    ("box", "told"),
    [
        ([10, 20, 20, 20], None),
        ([5, 5, 60, 50], None),  # what is hidden belongs to the box
        ([15, 20, 20, 20], "20% lie outside"),
        ([40, 40, 20, 20], "100% lie outside"),
        ([-30, -20, 110, 100], "3.6% of it are filled"),
    ],
)
def test_boxes_and_masks_that_disagree(coco: Maker, box: list[int], told: str | None) -> None:
    found = coco({"segmentation": SQUARE, "bbox": box}).scan_with_masks(0)
    warnings = [w for w in found.warnings if w.code == "mask-box"]
    assert len(found.annotations) == 1 and len(warnings) == (told is not None)
    assert told is None or told in warnings[0].message


def test_a_format_without_masks(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    Image.new("RGB", (20, 10)).save(tmp_path / "images" / "a.png")
    (tmp_path / "labels" / "a.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    (tmp_path / "data.yaml").write_text("val: images\nnames: [cat]\n")
    data = open_dataset(f"yolo:{tmp_path}:val")
    with pytest.raises(UserError, match=r"a\.txt") as caught:
        data.labels_with_masks(0)
    assert caught.value.code == "mask-missing"


def test_real_masks_are_pycocotools(shared_data: Path) -> None:
    from pycocotools.coco import COCO

    file = shared_data / "coco_mini" / "annotations" / "instances_val2017.json"
    data, theirs = open_dataset(f"coco:{shared_data / 'coco_mini'}:val"), COCO(str(file))
    seen = crowds = 0
    for i in range(0, len(data), 5):
        rows = {row["id"]: row for row in theirs.imgToAnns[data.image_id(i)]}
        for row in data.annotations(i):
            assert row.mask is not None
            own = rows[int(row.where.rsplit(" ", 1)[1])]
            expected = theirs.annToRLE(own)["counts"].decode()
            assert row.mask().rle(data.image_size(i)).counts == expected
            seen, crowds = seen + 1, crowds + row.ignore
        assert [f.code for f in data.scan_with_masks(i).errors] == []
    assert seen > 50 and crowds


def test_the_check_warns_of_masks_unless_they_are_wanted(coco: Maker) -> None:
    good, bad = {"segmentation": SQUARE}, {"segmentation": {"size": [60, 80], "counts": "PP"}}
    data = coco(good, bad, {"segmentation": []}, {"segmentation": SQUARE, "bbox": [50, 5, 9, 9]})
    plain, wanted = check(data), check(data, masks=True)
    assert plain.errors == [] and [f.code for f in plain.warnings] == ["mask-format", "mask-box"]
    assert plain.masks == 3 and "3 objects with a mask" in plain.text()
    assert [f.code for f in wanted.errors] == ["mask-format", "mask-missing"]
    assert [f.code for f in wanted.warnings] == ["mask-box"]
    assert inspect(data).findings == [] and inspect(data, masks=True).errors == wanted.errors
    one, two = coco(good), coco({"segmentation": [[10, 20, 30, 20, 30, 40]]})
    assert inspect(one).fingerprint == inspect(two).fingerprint
    assert inspect(one, masks=True).fingerprint != inspect(two, masks=True).fingerprint


def test_a_page_shows_masks(coco: Maker, tmp_path: Path) -> None:
    data = coco({"segmentation": SQUARE}, {"segmentation": "cat"})
    text = show(data, tmp_path / "page", 1).page.read_text()
    assert "mask-format" in text and "data:image/jpeg" in text


def test_masks_are_drawn_where_they_are() -> None:
    image = np.full((*SIZE, 3), 100, dtype=np.uint8)
    mask = encode(square())
    boxes, labels = np.array([[10.0, 20.0, 29.0, 39.0]]), np.array([-1])
    shown = draw(image, boxes, labels, ["cat"], masks=[mask]).astype(int)
    assert np.array_equal(shown != 100, np.repeat(square()[..., None], 3, -1))
    assert (shown[25:35, 15:25] == 122).all() and (shown[20, 10:30] == 150).all()
    assert (image == 100).all()
    without = draw(image, boxes, labels, ["cat"], masks=[None])
    assert np.array_equal(without, draw(image, boxes, labels, ["cat"]))
