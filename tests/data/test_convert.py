"""The same data in every format gives the same AP; splits and pages of pictures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from detr.data import Dataset, inspect, open_dataset
from detr.data.cli import data
from detr.data.convert import convert, split
from detr.data.synth import generate
from detr.errors import UserError
from detr.metrics.coco_ap import CocoAp, evaluate
from detr.types import Detections

WRITTEN = ("coco", "yolo", "voc")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("convert") / "scenes"
    generate(folder, images=12, size=(64, 128), seed=5, format="coco")
    return folder


def noisy(dataset: Dataset, shift: float = 0.0) -> dict[str, Detections]:
    """Detections near the objects, and some of none, by file name."""
    found = {}
    for i in sorted(range(len(dataset)), key=lambda i: dataset.image_path(i).stem):
        stem, labels = dataset.image_path(i).stem, dataset.labels(i)
        rng = np.random.default_rng(list(stem.encode()))
        order = np.lexsort((*labels.boxes.T, labels.labels))
        boxes = labels.boxes[order] + rng.normal(0, 1.0, labels.boxes.shape)
        wrong = rng.uniform(0, 300, (3, 4))
        wrong[:, 2:] = wrong[:, :2] + rng.uniform(10, 90, (3, 2))
        boxes = np.concatenate((boxes, wrong)).astype(np.float32) + np.float32(shift)
        scores = rng.uniform(size=len(boxes)).astype(np.float32)
        classes = rng.integers(0, len(dataset.classes), 3)
        ranked = np.argsort(-scores)
        found[stem] = Detections(
            boxes[ranked], scores[ranked], np.concatenate((labels.labels[order], classes))[ranked]
        )
    return found


def score(dataset: Dataset, detections: dict[str, Detections]) -> CocoAp:
    return evaluate(dataset, [detections[dataset.image_path(i).stem] for i in range(len(dataset))])


def same(ours: CocoAp, theirs: CocoAp) -> None:
    for name in ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"):
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), abs=1e-9), name
    for name, found in ours.per_class.items():
        assert found.ap == pytest.approx(theirs.per_class[name].ap, abs=1e-9), name
        assert found.count == theirs.per_class[name].count


@pytest.mark.slow
def test_carla_as_coco_yolo_and_voc_gives_the_same_ap(shared_data: Path, tmp_path: Path) -> None:
    carla = shared_data / "carla"
    coco = open_dataset(f"coco:{carla}:val")
    expected = score(coco, noisy(coco))
    assert 0.2 < expected.ap < 0.9 and expected.n_gt == 494

    spec = tmp_path / "voc.yaml"
    parts = {"images": "val2017", "annotations": "labels_voc/val"}
    spec.write_text(json.dumps({"format": "voc", "path": str(carla), **parts}))
    voc = open_dataset(str(spec), coco.classes)
    assert inspect(voc).findings == []
    same(score(voc, noisy(coco)), expected)

    for part, folder in (("images", "val2017"), ("labels", "labels_yolo/val")):
        (tmp_path / "yolo" / part).mkdir(parents=True)
        (tmp_path / "yolo" / part / "val").symlink_to(carla / folder)
    names = (carla / "labels.txt").read_text().split()
    (tmp_path / "yolo/data.yaml").write_text(json.dumps({"val": "images/val", "names": names}))
    yolo = open_dataset(f"yolo:{tmp_path / 'yolo'}:val")
    assert inspect(yolo).findings == [] and yolo.classes.names == coco.classes.names
    # Whoever made these labels moved each box by a pixel, as Darknet's script for VOC does.
    same(score(yolo, noisy(coco, shift=-1.0)), expected)
    for form in WRITTEN:
        convert(f"coco:{carla}:val", f"{form}:{tmp_path / form}_written:val", link=True)
        again = open_dataset(f"{form}:{tmp_path / form}_written:val", coco.classes)
        same(score(again, noisy(coco)), expected)


def test_there_and_back_through_every_format(scenes: Path, tmp_path: Path) -> None:
    source = f"coco:{scenes}:train"
    truth = open_dataset(source)
    for k, form in enumerate(("yolo", "voc", "coco")):
        done = convert(source, f"{form}:{tmp_path / f'{form}_{k}'}")
        assert done.images == len(truth) and done.data.endswith(":train")
        source = done.data
    back = open_dataset(source, truth.classes)
    ids = {truth.image_path(i).stem: i for i in range(len(truth))}
    for i in range(len(back)):
        j = ids[back.image_path(i).stem]
        ours, theirs = back.labels(i), truth.labels(j)
        np.testing.assert_allclose(ours.boxes, theirs.boxes, atol=1e-4)
        np.testing.assert_array_equal(ours.labels, theirs.labels)
        assert (back.image(i) == truth.image(j)).all() and back.image_size(i) == (64, 128)
    assert inspect(back).findings == []


def test_regions_go_where_the_format_has_some(scenes: Path, tmp_path: Path) -> None:
    truth = open_dataset(f"coco:{scenes}:train")
    regions = sum(len(truth.labels(i).ignore) for i in range(len(truth)))
    assert regions
    kept = convert(f"coco:{scenes}:train", f"voc:{tmp_path / 'voc'}")
    voc = open_dataset(kept.data, truth.classes)
    assert sum(len(voc.labels(i).ignore) for i in range(len(voc))) == regions
    done = convert(f"coco:{scenes}:train", f"yolo:{tmp_path / 'yolo'}")
    assert done.notes[0] == f"{regions} ignore regions left out: YOLO has none"
    kitti = convert(f"coco:{scenes}:train", f"kitti:{tmp_path / 'kitti'}:a")
    assert "occlusion and truncation are written as unknown" in kitti.notes[0]
    found = open_dataset(kitti.data)
    assert len(found) == len(truth) and inspect(found).errors == []


def test_splits_share_a_folder_and_nothing_is_overwritten(scenes: Path, tmp_path: Path) -> None:
    for form in ("yolo", "voc", "kitti"):
        for part in ("train", "val"):
            run = CliRunner().invoke(
                data, ["convert", f"coco:{scenes}:{part}", f"{form}:{tmp_path / form}", "--link"]
            )
            assert run.exit_code == 0, run.output
            found = open_dataset(f"{form}:{tmp_path / form}:{part}")
            assert len(found) == len(open_dataset(f"coco:{scenes}:{part}"))
            assert found.image_path(0).is_symlink()
        with pytest.raises(UserError) as caught:
            convert(f"coco:{scenes}:train", f"{form}:{tmp_path / form}")
        assert caught.value.code == "output-exists"
    # Where splits share a folder of pictures, none takes another's place.
    for form in ("voc", "kitti"):
        with pytest.raises(UserError) as caught:
            convert(f"coco:{scenes}:train", f"{form}:{tmp_path / form}:third")
        assert caught.value.code == "output-exists"


def test_what_only_a_yaml_can_say_is_to_be_said_again(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.new("RGB", (80, 60))
    picture.paste((255, 0, 0), (40, 10, 60, 50))
    picture.save(tmp_path / "a.jpg", exif=exif, quality=95)
    row = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [40, 10, 20, 40]}
    document = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 80, "height": 60}],
        "annotations": [row],
        "categories": [{"id": 1, "name": "red"}],
    }
    (tmp_path / "labels.json").write_text(json.dumps(document))
    spec = tmp_path / "d.yaml"
    spec.write_text("format: coco\nimages: .\nannotations: labels.json\nexif: ignore\n")
    done = convert(str(spec), f"yolo:{tmp_path / 'yolo'}")
    assert done.notes == ["say exif: ignore in a data YAML of it again"]
    assert inspect(open_dataset(done.data)).errors[0].code == "image-exif"
    spec.write_text("format: yolo\npath: yolo\nsplit: train\nexif: ignore\n")
    again = open_dataset(str(spec))
    x0, y0, x1, y1 = again.labels(0).boxes[0].astype(int)
    assert inspect(again).findings == [] and again.image(0)[y0:y1, x0:x1, 0].min() > 150


@pytest.mark.parametrize("to", ["yolo", "yolo:", "bdd100k:/tmp/x", "nothing:/tmp/x"])
def test_what_cannot_be_written(scenes: Path, to: str) -> None:
    with pytest.raises(UserError) as caught:
        convert(f"coco:{scenes}:val", to)
    assert (
        caught.value.code == "convert-format" and "kitti, coco, yolo, voc" in caught.value.message
    )


def test_a_set_with_errors_is_not_converted(scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text('{"images": [], "annotations": [], "categories": []}')
    with pytest.raises(UserError):
        convert(f"coco:{tmp_path / 'labels.json'}", f"yolo:{tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


def test_a_class_name_kitti_cannot_hold(scenes: Path, tmp_path: Path) -> None:
    path = scenes / "annotations/instances_val2017.json"
    document = json.loads(path.read_text())
    document["categories"][0]["name"] = "traffic light"
    (tmp_path / "labels.json").write_text(json.dumps(document))
    spec = tmp_path / "d.yaml"
    parts = {"images": str(scenes / "val2017"), "annotations": "labels.json"}
    spec.write_text(json.dumps({"format": "coco", **parts}))
    with pytest.raises(UserError, match=r"classes: \{traffic_light: \['traffic light'\]\}"):
        convert(str(spec), f"kitti:{tmp_path / 'kitti'}")


def test_a_kitti_folder_is_split_as_the_papers_do(tmp_path: Path) -> None:
    for folder in ("image_2", "label_2"):
        (tmp_path / "training" / folder).mkdir(parents=True)
    for k in range(20):
        Image.new("RGB", (40, 20)).save(tmp_path / f"training/image_2/{k:06}.png")
        (tmp_path / f"training/label_2/{k:06}.txt").write_text("")
    run = CliRunner().invoke(data, ["split", f"kitti:{tmp_path}", "--val", "0.2", "--seed", "0"])
    assert run.exit_code == 0, run.output
    assert run.stdout == f"kitti:{tmp_path}:train: 16 images\nkitti:{tmp_path}:val: 4 images\n"
    parts = [open_dataset(f"kitti:{tmp_path}:{part}") for part in ("train", "val")]
    ids = [{d.image_id(i) for i in range(len(d))} for d in parts]
    assert ids[0] | ids[1] == set(range(20)) and not ids[0] & ids[1]
    with pytest.raises(UserError) as caught:
        split(f"kitti:{tmp_path}", 0.2, 1)
    assert caught.value.code == "output-exists"
    again = split(f"kitti:{tmp_path}", 0.2, 0, tmp_path / "again")
    other = split(f"kitti:{tmp_path}", 0.2, 1, tmp_path / "other")
    val = [open_dataset(parts.val) for parts in (again, other)]
    assert {val[0].image_id(i) for i in range(4)} == ids[1]
    assert {val[1].image_id(i) for i in range(4)} != ids[1]
    assert val[0].protocols.kitti is not None and val[0].protocols.kitti.objects(0) == []


def test_any_other_set_is_split_by_two_lists(scenes: Path, tmp_path: Path) -> None:
    parts = split(f"coco:{scenes}:train", 0.3, 0, tmp_path)
    train, val = open_dataset(parts.train), open_dataset(parts.val)
    whole = open_dataset(f"coco:{scenes}:train")
    assert len(train) == parts.train_images == len(whole) - round(0.3 * len(whole))
    assert len(val) == parts.val_images and train.classes == whole.classes
    ids = [{d.image_id(i) for i in range(len(d))} for d in (train, val, whole)]
    assert ids[0] | ids[1] == ids[2] and not ids[0] & ids[1]
    position = {whole.image_id(i): i for i in range(len(whole))}[val.image_id(1)]
    assert (val.labels(1).boxes == whole.labels(position).boxes).all()
    assert inspect(val).images == len(val)
    for share in (0.0, 1.0, 0.01):
        with pytest.raises(UserError) as caught:
            split(f"coco:{scenes}:train", share, 0, tmp_path / "x")
        assert caught.value.code == "split-share"


@pytest.mark.parametrize(
    ("rows", "says"),
    [("nothing.png\n", "that of 0 images"), ("{0}\n\n{0}\n", "val.txt:3: .* is in line 1 already")],
)
def test_a_list_that_does_not_fit(scenes: Path, tmp_path: Path, rows: str, says: str) -> None:
    parts = split(f"coco:{scenes}:train", 0.3, 0, tmp_path)
    name = (tmp_path / "val.txt").read_text().split()[0]
    (tmp_path / "val.txt").write_text(rows.format(name))
    with pytest.raises(UserError, match=says) as caught:
        open_dataset(parts.val)
    assert caught.value.code == "split-row"


def test_a_page_of_pictures(scenes: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke(
        data, ["show", f"coco:{scenes}:train", "--out", str(tmp_path / "page"), "--images", "5"]
    )
    assert run.exit_code == 0 and run.stdout == f"5 images in {tmp_path / 'page.html'}\n"
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/jpeg;base64,") == page.count("<article>") == 5
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)  # needs no other file
    shown = open_dataset(f"coco:{scenes}:train")
    assert shown.image_path(0).name in page and "Car" in page


def test_the_page_says_what_is_wrong_and_escapes_names(tmp_path: Path) -> None:
    name = "<b>odd.png"
    (tmp_path / name).write_bytes(b"no picture")
    row = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [400, 2, 3, 4]}
    document = {
        "images": [{"id": 1, "file_name": name, "width": 80, "height": 60}],
        "annotations": [row],
        "categories": [{"id": 1, "name": "<i>car"}],
    }
    (tmp_path / "labels.json").write_text(json.dumps(document))
    run = CliRunner().invoke(
        data, ["show", f"coco:{tmp_path / 'labels.json'}", "--out", str(tmp_path / "p.html")]
    )
    assert run.exit_code == 0, run.output
    page = (tmp_path / "p.html").read_text()
    assert "<b>odd" not in page and "<i>car" not in page and "&lt;i&gt;car" in page
    assert "box-outside" in page and "image-unreadable" in page


def masks_of(dataset: Dataset) -> dict[str, list[tuple[int, str]]]:
    """Class and run lengths of the objects, by file name."""
    found = {}
    for i in range(len(dataset)):
        labels = dataset.labels_with_masks(i)
        runs = [mask.rle(dataset.image_size(i)).counts for mask in labels.masks or ()]
        found[dataset.image_path(i).stem] = list(zip(labels.labels.tolist(), runs, strict=True))
    return found


def test_masks_stay_what_they_are(scenes: Path, tmp_path: Path) -> None:
    """In COCO by themselves, in YOLO as polygons, and back."""
    source = f"coco:{scenes}:train"
    expected = masks_of(open_dataset(source))
    assert sum(map(len, expected.values())) > 5
    assert not any("mask" in note for note in convert(source, f"coco:{tmp_path / 'c'}").notes)
    assert masks_of(open_dataset(f"coco:{tmp_path / 'c'}:train")) == expected
    assert not any(
        "masks" in n for n in convert(source, f"yolo:{tmp_path / 'y'}", polygons=True).notes
    )
    assert masks_of(open_dataset(f"yolo:{tmp_path / 'y'}:train")) == expected
    convert(f"yolo:{tmp_path / 'y'}:train", f"coco:{tmp_path / 'z'}:train")
    assert masks_of(open_dataset(f"coco:{tmp_path / 'z'}:train")) == expected
    parts = split(f"coco:{tmp_path / 'c'}:train", 0.3, 0, tmp_path)
    both = masks_of(open_dataset(parts.train)) | masks_of(open_dataset(parts.val))
    assert both == expected


def test_masks_that_are_lost_are_told(scenes: Path, tmp_path: Path) -> None:
    source = f"coco:{scenes}:train"
    assert any("--polygons" in n for n in convert(source, f"yolo:{tmp_path / 'y'}").notes)
    assert any("voc has none" in n for n in convert(source, f"voc:{tmp_path / 'v'}").notes)
    with pytest.raises(UserError, match="--polygons is for YOLO"):
        convert(source, f"voc:{tmp_path / 'w'}", polygons=True)
    path = tmp_path / "c" / "annotations" / "instances_train.json"
    convert(source, f"coco:{tmp_path / 'c'}", link=True)
    document = json.loads(path.read_text())
    document["annotations"][0]["segmentation"]["counts"] = "PP"
    path.write_text(json.dumps(document))
    notes = convert(f"coco:{tmp_path / 'c'}:train", f"coco:{tmp_path / 'd'}").notes
    assert notes == ["1 mask left out that cannot be read"]
    with pytest.raises(UserError, match="too early") as caught:
        convert(f"coco:{tmp_path / 'c'}:train", f"yolo:{tmp_path / 'e'}", polygons=True)
    assert caught.value.code == "mask-format"
