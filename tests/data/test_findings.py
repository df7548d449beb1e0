"""What the doctor calls an error stops training and scoring, or a named switch corrects it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from bench.score import score
from detr.data import Dataset, inspect, open_dataset
from detr.data.check import check
from detr.data.cli import data
from detr.data.coco_document import coco_ground_truth
from detr.errors import UserError

Maker = Callable[..., Path]


def coco(folder: Path, images: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> Path:
    """Annotations alone; rows are filled up."""
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    document = {
        "images": [
            {"file_name": f"{row['id']}.png", "width": 320, "height": 240, **row} for row in images
        ],
        "annotations": [
            {"id": k, "category_id": 1, "area": 1.0, "iscrowd": 0, **row}
            for k, row in enumerate(annotations, start=1)
        ],
        "categories": [{"id": 1, "name": "a"}],
    }
    (folder / "annotations" / "instances_val2017.json").write_text(json.dumps(document))
    (folder / "val2017").mkdir(exist_ok=True)
    return folder


def with_switch(folder: Path, **switches: Any) -> str:
    path = folder / "data.yaml"
    path.write_text(json.dumps({"format": "coco", "path": ".", **switches}))
    return str(path)


def codes(dataset: Dataset) -> list[str]:
    return [finding.code for finding in inspect(dataset).findings]


@pytest.fixture
def turned(tmp_path: Path) -> Path:
    """A red box on the raw raster of JPEGs that EXIF turns by a quarter."""
    folder = coco(
        tmp_path,
        [{"id": k, "file_name": f"{k}.jpg"} for k in (1, 2)],
        [{"image_id": k, "bbox": [200, 20, 100, 60]} for k in (1, 2)],
    )
    exif = Image.Exif()
    exif[0x0112] = 6
    for k in (1, 2):
        picture = Image.new("RGB", (320, 240))
        picture.paste((255, 0, 0), (200, 20, 300, 80))
        picture.save(folder / "val2017" / f"{k}.jpg", exif=exif, quality=95)
    return folder


def test_boxes_on_the_raw_raster_of_turned_images(turned: Path) -> None:
    dataset = open_dataset(f"coco:{turned}")
    assert codes(dataset) == ["image-exif"] * 2 == [f.code for f in check(dataset).errors]
    with pytest.raises(UserError, match=r"320x240 to 240x320.*exif: ignore.*1 more error") as stop:
        inspect(dataset).stop()
    assert stop.value.code == "image-exif"

    raw = open_dataset(with_switch(turned, exif="ignore"))
    assert codes(raw) == [] == check(raw).findings
    image, (x0, y0, x1, y1) = raw.image(0), raw.labels(0).boxes[0].astype(int)
    assert image.shape[:2] == raw.image_size(0) == (240, 320)
    assert image[y0:y1, x0:x1, 0].mean() > 240 and image[..., 0].mean() < 40
    # The other raster is no way out: its size is not the labels'.
    assert codes(open_dataset(with_switch(turned, exif="apply"))) == ["image-size"] * 2


def test_labels_that_do_not_tell_the_raster_ask_for_the_switch(turned: Path) -> None:
    document = json.loads((turned / "annotations/instances_val2017.json").read_text())
    for row in document["images"]:
        row["width"], row["height"] = 240, 320
    for row in document["annotations"]:
        row["bbox"] = [20, 20, 60, 100]
    (turned / "annotations/instances_val2017.json").write_text(json.dumps(document))
    assert codes(open_dataset(f"coco:{turned}")) == []  # upright, as their sizes say
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down: either raster has the same size
    Image.new("RGB", (240, 320)).save(turned / "val2017/1.jpg", exif=exif)
    assert codes(open_dataset(f"coco:{turned}")) == ["image-exif"]
    for switch in ("apply", "ignore"):
        assert "image-exif" not in codes(open_dataset(with_switch(turned, exif=switch)))
    with pytest.raises(UserError, match="exif"):
        open_dataset(with_switch(turned, exif="maybe"))


def test_resized_copies(tmp_path: Path) -> None:
    folder = coco(tmp_path, [{"id": 1}], [{"image_id": 1, "bbox": [0, 0, 9, 9]}])
    Image.new("RGB", (160, 120)).save(folder / "val2017/1.png")
    with pytest.raises(UserError, match=r"1.png: is 160x120, its labels are for 320x240"):
        inspect(open_dataset(f"coco:{folder}")).stop()


@pytest.fixture
def odd_boxes(tmp_path: Path) -> Path:
    """A box each in nine images: of no, of negative, of hardly any size, outside, cut."""
    boxes: list[list[float]] = [
        [50, 50, 40, 40], [60, 60, 0, 30], [60, 60, -20, 30], [100, 100, -30, -30],
        [-40, 20, 60, 60], [400, 20, 30, 30], [300, 200, 100, 100], [10, 10, 1e-6, 1e-6],
        [20, 20, 0.4, 50],
    ]  # fmt: skip
    images = range(1, len(boxes) + 1)
    folder = coco(
        tmp_path,
        [{"id": k} for k in images],
        [{"image_id": k, "bbox": box} for k, box in zip(images, boxes, strict=True)],
    )
    for k in images:
        Image.new("RGB", (320, 240)).save(folder / f"val2017/{k}.png")
    perfect = [
        {"image_id": k, "category_id": 1, "bbox": box, "score": 0.9}
        for k, box in zip(images, boxes, strict=True)
    ]
    (folder / "detections.json").write_text(json.dumps(perfect))
    return folder


def test_one_answer_to_odd_boxes_in_check_training_and_scoring(odd_boxes: Path) -> None:
    dataset = open_dataset(f"coco:{odd_boxes}")
    assert sorted(codes(dataset)) == [
        "box-empty", "box-inverted", "box-inverted", "box-outside", "box-over-border",
        "box-over-border",
    ]  # fmt: skip
    with pytest.raises(UserError, match="annotation 3"):
        score(odd_boxes / "detections.json", dataset)
    with pytest.raises(UserError, match="annotation 6"):
        dataset.labels(5)

    dropped = open_dataset(with_switch(odd_boxes, drop=["box-inverted", "box-outside"]))
    assert check(dropped).objects == inspect(dropped).objects == 5
    assert sum(len(dropped.labels(i).boxes) for i in range(9)) == 5
    assert len(coco_ground_truth(dropped)["annotations"]) == 5
    found = score(odd_boxes / "detections.json", dropped)
    assert found.coco is not None and found.coco.n_gt == 5
    assert "box-inverted 2" in found.text() and "box-empty 1" in found.text()


def test_a_flat_region_is_left_out_without_ado(tmp_path: Path) -> None:
    folder = coco(
        tmp_path,
        [{"id": 1}],
        [
            {"image_id": 1, "bbox": [0, 0, 9, 9]},
            {"image_id": 1, "bbox": [400, 0, 9, 9], "iscrowd": 1},
            {"image_id": 1, "bbox": [40, 0, -9, 9], "iscrowd": 1},
        ],
    )
    found = inspect(open_dataset(f"coco:{folder}"), pictures=False)
    assert not found.errors and len(found.warnings) == 2 and found.objects == 1


def test_an_area_of_null_is_that_of_the_box(tmp_path: Path) -> None:
    folder = coco(tmp_path, [{"id": 1}], [{"image_id": 1, "bbox": [0, 0, 50, 50], "area": None}])
    assert coco_ground_truth(open_dataset(f"coco:{folder}"))["annotations"][0]["area"] == 2500


@pytest.mark.parametrize(
    ("image", "says"),
    [
        ({"height": None}, 'entry 0 ("1.png"): height is null, not a whole number'),
        ({"width": 0}, "width is 0, less than 1"),
        ({"id": 1.5}, "id is 1.5, not a whole number or text"),
        ({"file_name": 7}, "file_name is 7, not text"),
    ],
)
def test_a_bad_image_row_is_named(tmp_path: Path, image: dict[str, Any], says: str) -> None:
    folder = coco(tmp_path, [{"id": 1, "file_name": "1.png", **image}], [])
    with pytest.raises(UserError) as caught:
        open_dataset(f"coco:{folder}")
    assert caught.value.code == "coco-json" and says in caught.value.message


def test_images_told_twice_as_a_public_data_set_has_them(tmp_path: Path) -> None:
    """What is wrong in one screen: which entries, how often, what of it can be used."""
    images = [{"id": "_semantic", "file_name": "_semantic"} for _ in range(30)]
    images += [{"id": f"{k:03}"} for k in range(40)] + [{"id": f"{k:03}"} for k in range(8)]
    images += [{"id": "one", "file_name": "z.png"}, {"id": "two", "file_name": "z.png"}]
    rows = [{"image_id": row["id"], "bbox": [1, 1, 20, 20]} for row in images]
    folder = coco(tmp_path, images, [*rows, {"image_id": "none", "bbox": [1, 1, 20, 20]}])
    dataset = open_dataset(f"coco:{folder}")
    run = CliRunner().invoke(data, ["check", f"coco:{folder}"])
    assert run.exit_code == 2 and len(run.stdout.splitlines()) < 40
    assert "48 of 80 images share their id or file" in run.stdout
    assert "32 images with 32 annotations can be used: drop: [image-twice]" in run.stdout
    assert 'id "_semantic" is that of 30 entries; 30 annotations could be' in run.stdout
    assert "[image-twice] ... and 6 more" in run.stdout
    assert 'image_id "none" is not in images' in run.stdout
    with pytest.raises(UserError) as caught:
        dataset.labels(0)
    assert caught.value.code == "image-twice"

    switches = {"drop": ["image-twice", "coco-orphan", "image-missing"]}
    Image.new("RGB", (320, 240)).save(folder / "val2017/020.png")
    usable = open_dataset(with_switch(folder, **switches))
    assert [usable.image_id(i) for i in range(len(usable))] == ["020"]
    found = inspect(usable)
    assert not found.errors and found.objects == 1
    assert {f.code for f in found.warnings} == {"image-twice", "coco-orphan", "image-missing"}


def test_the_published_files_of_carla(shared_data: Path, tmp_path: Path) -> None:
    spec = tmp_path / "d.yaml"
    parts = {"images": "val2017", "annotations": "annotations_as_published/val.json"}
    spec.write_text(json.dumps({"format": "coco", "path": str(shared_data / "carla"), **parts}))
    run = CliRunner().invoke(data, ["check", str(spec)])
    assert run.exit_code == 2 and len(run.stdout.splitlines()) < 45
    assert "52 of 156 images share their id or file" in run.stdout
    assert '"_semantic" is that of 35 entries' in run.stdout
    assert "104 images with 380 annotations can be used" in run.stdout


def test_roboflow_s_layout(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        folder = tmp_path / split
        folder.mkdir()
        Image.new("RGB", (160, 120)).save(folder / "img_0_png.rf.0a1b0.jpg")
        document = {
            "categories": [
                {"id": 0, "name": "vehicles", "supercategory": "none"},
                {"id": 1, "name": "car", "supercategory": "vehicles"},
                {"id": 2, "name": "van", "supercategory": "vehicles"},
            ],
            "images": [
                {"id": 0, "file_name": "img_0_png.rf.0a1b0.jpg", "height": 120, "width": 160}
            ],
            "annotations": [
                {"id": 0, "image_id": 0, "category_id": 2, "bbox": [10, 10, 50, 40], "area": 2000}
            ],
        }
        (folder / "_annotations.coco.json").write_text(json.dumps(document))
    dataset = open_dataset(f"coco:{tmp_path}:valid")
    assert dataset.classes.names == ("car", "van") and dataset.classes.category_ids == (1, 2)
    assert inspect(dataset).findings == [] and dataset.labels(0).labels.tolist() == [1]
    with pytest.raises(UserError, match="name a split; there are: train, valid"):
        open_dataset(f"coco:{tmp_path}")
    # Where something is annotated as the whole, the whole is a class.
    document["annotations"][0]["category_id"] = 0
    (folder / "_annotations.coco.json").write_text(json.dumps(document))
    assert open_dataset(f"coco:{tmp_path}:valid").classes.names == ("vehicles", "car", "van")


def test_images_and_annotations_lie_where_the_yaml_says(tmp_path: Path) -> None:
    folder = coco(tmp_path / "x", [{"id": 1}], [{"image_id": 1, "bbox": [0, 0, 9, 9]}])
    (folder / "annotations/instances_val2017.json").rename(tmp_path / "labels.json")
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (320, 240)).save(tmp_path / "pictures/1.png")
    spec = tmp_path / "d.yaml"
    spec.write_text("format: coco\nimages: pictures\nannotations: labels.json\n")
    assert inspect(open_dataset(str(spec))).findings == []
    spec.write_text("format: coco\nannotations: labels.json\nsplit: val\n")
    with pytest.raises(UserError, match="leave out split"):
        open_dataset(str(spec))
    # An annotation file alone, with its pictures beside it.
    (tmp_path / "labels.json").rename(tmp_path / "pictures/labels.json")
    assert inspect(open_dataset(f"coco:{tmp_path / 'pictures/labels.json'}")).findings == []


def test_no_object_at_all_is_told_before_anything_else(tmp_path: Path) -> None:
    for folder in ("image_2", "label_2"):
        (tmp_path / "training" / folder).mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 255, (60, 100, 3), dtype=np.uint8)
    region = "DontCare -1 -1 -10 0 0 9 9 -1 -1 -1 -1000 -1000 -1000 -10\n"
    for k, text in enumerate(["", region]):
        Image.fromarray(noise).save(tmp_path / f"training/image_2/{k:06}.png")
        (tmp_path / f"training/label_2/{k:06}.txt").write_text(text)
    with pytest.raises(UserError) as caught:
        inspect(open_dataset(f"kitti:{tmp_path}")).stop()
    assert caught.value.code == "no-ground-truth"
    # Some images without objects are no mistake.
    car = "Car 0 0 -1.5 20 20 80 50 1.5 1.6 3.9 1 1.6 20 -1.5\n"
    (tmp_path / "training/label_2/000001.txt").write_text(car + region)
    assert inspect(open_dataset(f"kitti:{tmp_path}")).findings == []


def test_without_pictures_labels_can_still_be_scored(odd_boxes: Path) -> None:
    for path in (odd_boxes / "val2017").iterdir():
        path.unlink()
    dataset = open_dataset(f"coco:{odd_boxes}")
    assert "image-missing" in codes(dataset)
    assert "image-missing" not in {f.code for f in inspect(dataset, pictures=False).findings}
