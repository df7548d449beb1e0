"""Scoring detections from files, and every way such files can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bench.cli import main
from bench.score import score
from detr.data import open_dataset
from detr.errors import UserError

TAIL = "-1 -1 -1 -1000 -1000 -1000 -10"


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Annotations of two images and two categories; no images anywhere."""
    path = tmp_path / "instances_val.json"
    box = {"bbox": [10, 10, 50, 40], "area": 2000, "iscrowd": 0}
    path.write_text(
        json.dumps(
            {
                "images": [
                    {"id": n, "file_name": f"{n}.jpg", "width": 100, "height": 80} for n in (7, 9)
                ],
                "categories": [{"id": 3, "name": "car"}, {"id": 11, "name": "hydrant"}],
                "annotations": [
                    {"id": 1, "image_id": 7, "category_id": 3, **box},
                    {"id": 2, "image_id": 9, "category_id": 11, **box},
                ],
            }
        )
    )
    return path


def entry(**changes: Any) -> dict[str, Any]:
    good = {"image_id": 7, "category_id": 3, "bbox": [10, 10, 50, 40], "score": 0.5}
    return {k: v for k, v in {**good, **changes}.items() if v != "drop"}


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.fixture
def kitti_results(bright_cars: Path) -> Path:
    """Perfect result files for the six frames."""
    folder = bright_cars / "results"
    folder.mkdir()
    for n in range(6):
        x = 10 + 12 * n
        text = f"Car -1 -1 -10 {x} 10 {x + 30} 55 {TAIL} 0.{9 - n}\n"
        (folder / f"{n:06d}.txt").write_text(text)
    (folder / "000099.txt").write_text("a file of another split is left alone\n")
    return folder


def test_official_fixture_from_the_command_line(shared_data: Path) -> None:
    folder = shared_data / "coco_eval"
    run = CliRunner().invoke(
        main,
        [
            *("score", str(folder / "instances_val2014_fakebbox100_results.json"), "--json"),
            *("--data", f"coco:{folder / 'instances_val2014_100.json'}"),
        ],
    )
    assert run.exit_code == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["protocol"] == "coco"
    assert found["coco"]["ap"] == pytest.approx(0.5045806987, abs=1e-9)
    assert found["coco"]["ap50"] == pytest.approx(0.6969727247, abs=1e-9)
    assert found["coco"]["ap75"] == pytest.approx(0.5729816669, abs=1e-9)


def test_text_output(coco: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "r.json", [entry()])
    run = CliRunner().invoke(main, ["score", str(file), "--data", f"coco:{coco}"])
    lines = run.stdout.splitlines()
    assert lines[0].split() == ["class", "boxes", "AP", "AP50"]
    assert lines[1].split() == ["car", "1", "100.0", "100.0"]
    assert lines[2].split() == ["hydrant", "1", "0.0", "0.0"]
    assert lines[3].split() == ["all", "2", "50.0", "50.0"]


def test_kitti_folder_by_both_protocols_without_images(
    bright_cars: Path, kitti_results: Path
) -> None:
    for image in (bright_cars / "training/image_2").iterdir():
        image.unlink()
    data = open_dataset(f"kitti:{bright_cars}:val")
    kitti = score(kitti_results, data)
    assert kitti.protocol == "kitti"
    assert kitti.kitti is not None
    assert list(kitti.kitti.per_class) == ["Car", "Pedestrian", "Cyclist"]
    assert kitti.kitti.per_class["Car"].easy.count == 6
    assert kitti.kitti.per_class["Car"].easy.ap11 == pytest.approx(2 / 11)  # 6 of 41 samples
    assert "easy" in kitti.text() and "†" in kitti.text()
    coco = score(kitti_results, data, "coco")
    assert coco.coco is not None
    assert coco.coco.ap == 1.0


def test_coco_results_by_the_kitti_protocol(
    bright_cars: Path, kitti_results: Path, tmp_path: Path
) -> None:
    entries = [
        entry(image_id=n, category_id=1, bbox=[10 + 12 * n, 10, 30, 45], score=0.9 - n / 10)
        for n in range(6)
    ]
    file = write(tmp_path / "r.json", entries)
    data = open_dataset(f"kitti:{bright_cars}:val")
    assert score(file, data, "kitti").kitti == score(kitti_results, data).kitti


@pytest.mark.parametrize(
    ("content", "code", "said"),
    [
        ([entry(), entry(category_id=90)], "detections-class", "entry 1: category_id 90 is not"),
        ([entry(image_id=8)], "detections-image", "entry 0: image_id 8 is not in coco:"),
        ([entry(bbox="drop")], "detections-entry", "entry 0: bbox is not [x, y, width, height]"),
        ([entry(bbox=[1, 2, 3])], "detections-entry", "entry 0: bbox"),
        ([entry(score="0.5")], "detections-entry", "entry 0: score is not a number"),
        ([entry(score=float("nan"))], "detections-entry", "entry 0: score"),
        ([entry(image_id="7")], "detections-image", "entry 0: image_id '7' is not in coco:"),
        ([entry(image_id=7.5)], "detections-entry", "entry 0: image_id is no whole number"),
        ([3], "detections-entry", "entry 0: not an object"),
        ({"annotations": []}, "detections-unreadable", "is a list of detections"),
        ("{", "detections-unreadable", "not JSON"),
    ],
)
def test_bad_results_file(coco: Path, tmp_path: Path, content: Any, code: str, said: str) -> None:
    file = write(tmp_path / "r.json", content)
    run = CliRunner().invoke(main, ["score", str(file), "--data", f"coco:{coco}"])
    assert run.exit_code == 2
    assert run.stderr.startswith(f"error[{code}]: {file}")
    assert said in run.stderr
    assert run.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "text", "code", "said"),
    [
        ("000002.txt", None, "detections-image", "1 of 6 images have no result file"),
        ("000002.txt", f"Cow -1 -1 -10 0 0 9 9 {TAIL} 0.5", "detections-class", ":1: class 'Cow'"),
        ("000002.txt", f"\nCar -1 -1 -10 0 0 9 9 {TAIL}", "detections-entry", ":2: 15 columns"),
        ("000002.txt", "Car 0 0", "kitti-label-columns", ":1: 3 columns"),
    ],
)
def test_bad_result_folder(
    bright_cars: Path, kitti_results: Path, name: str, text: str | None, code: str, said: str
) -> None:
    if text is None:
        (kitti_results / name).unlink()
    else:
        (kitti_results / name).write_text(text + "\n")
    with pytest.raises(UserError) as caught:
        score(kitti_results, open_dataset(f"kitti:{bright_cars}:val"))
    assert caught.value.code == code
    assert said in caught.value.message
    assert name in caught.value.message


def test_kitti_protocol_needs_kitti_labels(coco: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "r.json", [entry()])
    with pytest.raises(UserError, match="needs KITTI labels"):
        score(file, open_dataset(f"coco:{coco}"), "kitti")


def test_missing_detections(coco: Path) -> None:
    with pytest.raises(UserError) as caught:
        score(Path("/nowhere/r.json"), open_dataset(f"coco:{coco}"))
    assert caught.value.code == "detections-missing"


def test_the_kitti_protocol_leaves_out_what_others_were_merged_into(
    bright_cars: Path, kitti_results: Path
) -> None:
    spec = bright_cars / "data.yaml"
    form = "format: kitti\npath: .\nsplit: val\nclasses: {%s}\nignore: ['*']\n"
    spec.write_text(form % "Car: [Car, Truck], Pedestrian: [Pedestrian, Person_sitting]")
    found = score(kitti_results, open_dataset(str(spec)), "kitti").kitti
    assert found is not None and list(found.per_class) == ["Pedestrian"]
    spec.write_text(form % "Car: [Car, Van]")
    found = score(kitti_results, open_dataset(str(spec))).kitti
    assert found is not None and list(found.per_class) == ["Car"]


def test_image_ids_may_be_text_from_the_file_to_the_score(tmp_path: Path) -> None:
    names = ["frame_10", "frame_9", "a"]
    box = {"area": 2000, "iscrowd": 0, "category_id": 1}
    path = write(
        tmp_path / "instances_val.json",
        {
            "images": [
                {"id": n, "file_name": f"{n}.jpg", "width": 100, "height": 80} for n in names
            ],
            "categories": [{"id": 1, "name": "car"}],
            "annotations": [
                {"id": k, "image_id": n, "bbox": [10, 10, 50, 40 - k], **box}
                for k, n in enumerate(names, start=1)
            ],
        },
    )
    data = open_dataset(f"coco:{path}")
    right = [
        entry(image_id=n, category_id=1, bbox=[10, 10, 50, 40 - k])
        for k, n in enumerate(names, start=1)
    ]
    found = score(write(tmp_path / "r.json", right), data).coco
    assert found is not None and found.ap == 1.0 and found.images == found.n_gt == 3
    wrong = [{**r, "image_id": "a"} for r in right]
    found = score(write(tmp_path / "w.json", wrong), data).coco
    assert found is not None and found.ap < 0.5


def test_equal_scores_rank_alike_whatever_the_ids_are(coco: Path, tmp_path: Path) -> None:
    """The evaluator goes through images in the order of their ids, which breaks ties."""
    document = json.loads(coco.read_text())
    entries = [entry(bbox=[10, 10, 50, y]) for y in (40, 21)] + [entry(image_id=9)]
    by_number = score(write(tmp_path / "n.json", entries), open_dataset(f"coco:{coco}")).coco
    for row, key in [(r, "id") for r in document["images"]] + [
        (r, "image_id") for r in [*document["annotations"], *entries]
    ]:
        row[key] = f"image {row[key]}"
    write(coco, document)
    by_text = score(write(tmp_path / "t.json", entries), open_dataset(f"coco:{coco}")).coco
    assert by_text == by_number and by_text is not None and by_text.ap < 1


SQUARE = [[10, 10, 60, 10, 60, 50, 10, 50]]


@pytest.fixture
def with_masks(coco: Path) -> Path:
    """The same annotations, whose objects fill their boxes."""
    document = json.loads(coco.read_text())
    for row in document["annotations"]:
        row["segmentation"] = SQUARE
    return write(coco, document)


def masked(**changes: Any) -> dict[str, Any]:
    """Half of the object, as run lengths; without a box."""
    counts = [810, *[20, 60] * 49, 20, 8000 - 810 - 50 * 20 - 49 * 60]
    mask = {"size": [80, 100], "counts": counts}
    return entry(bbox="drop", **{"segmentation": mask, **changes})


def test_masks_are_scored_beside_boxes(with_masks: Path, tmp_path: Path) -> None:
    whole = entry(segmentation=SQUARE, image_id=9, category_id=11)
    results = write(
        tmp_path / "r.json", [whole, {k: v for k, v in masked().items() if k != "bbox"}]
    )
    found = score(results, open_dataset(f"coco:{with_masks}"), boundary=True)
    assert found.coco is not None and found.masks is not None and found.boundary is not None
    # Half the object has IoU 0.5, exactly.
    assert found.masks.per_class["hydrant"].ap == 1.0 == found.masks.per_class["car"].ap50
    assert found.masks.per_class["car"].ap == found.coco.per_class["car"].ap == pytest.approx(0.1)
    assert found.boundary.ap <= found.masks.ap
    text = found.text()
    assert "masks:" in text and "masks, boundary IoU:" in text
    boxes = score(write(tmp_path / "b.json", [entry()]), open_dataset(f"coco:{with_masks}"))
    assert boxes.masks is None and "masks" not in boxes.text()


def test_masks_without_masks_in_the_labels(coco: Path, tmp_path: Path) -> None:
    results = write(tmp_path / "r.json", [entry(segmentation=SQUARE)])
    data = open_dataset(f"coco:{coco}")
    found = score(results, data)
    assert found.masks is None and found.coco is not None
    assert any("masks are not scored" in note and "annotation 1" in note for note in found.notes)
    with pytest.raises(UserError, match="annotation 1") as caught:
        score(results, data, boundary=True)
    assert caught.value.code == "mask-missing"
    with pytest.raises(UserError, match="detections have no masks"):
        score(write(tmp_path / "b.json", [entry()]), data, boundary=True)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([entry(segmentation=SQUARE), entry()], "entry 1: has no segmentation"),
        ([entry(segmentation="cat")], "entry 0: segmentation: is"),
        ([entry(segmentation={"size": [100, 80], "counts": "0"})], "image of 80x100"),
        ([entry(segmentation={"size": [80, 100], "counts": "PP"})], "too early"),
        ([entry(segmentation=SQUARE, bbox=None)], "bbox"),
    ],
)
def test_bad_masks_of_results(
    with_masks: Path, tmp_path: Path, entries: list[dict[str, Any]], words: str
) -> None:
    results = write(tmp_path / "r.json", entries)
    with pytest.raises(UserError, match="entry") as caught:
        score(results, open_dataset(f"coco:{with_masks}"))
    assert caught.value.code == "detections-entry" and words in caught.value.message
