"""``detr predict`` on folders, patterns and broken files: what it leaves in its folder."""

from __future__ import annotations

import csv
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from bench.detections import read_kitti_folder
from detr.ahead import ahead
from detr.data import open_dataset
from detr.data.names import distinct_names
from detr.errors import UserError
from engines.cli import predict
from engines.predict.sources import find_sources

MakeBundle = Callable[..., Path]
FOUND = 5  # objects the toy model finds in any image


def picture(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 60, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six images in two folders, two of one name, and a broken one."""
    for n in range(5):
        picture(tmp_path / f"day/left/{n:06d}.png", n)
    picture(tmp_path / "day/right/000004.png", 9)
    (tmp_path / "day/left/000002.png").write_bytes(b"no picture")
    (tmp_path / "day/left/notes.txt").write_text("not an image")
    return tmp_path / "day"


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(predict, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("batch", ["dynamic", 4])
def test_one_bad_image_costs_one_answer(
    toy_bundle: MakeBundle, folder: Path, tmp_path: Path, batch: int | str
) -> None:
    out = tmp_path / "out"
    kinds = [word for kind in ("pictures", "coco", "kitti", "yolo") for word in ("--save", kind)]
    done = run(toy_bundle(batch), folder, "--out", out, *kinds)
    assert "5 images" in done.stdout
    assert "000002.png: not a picture" in done.stderr and "1 file skipped" in done.stderr
    (skipped,) = rows(out / "skipped.csv")
    assert skipped["code"] == "image-unreadable" and skipped["path"].endswith("left/000002.png")
    images = rows(out / "images.csv")
    names = [row["name"] for row in images]
    assert names == ["left_000000", "left_000001", "left_000003", "left_000004", "right_000004"]
    for kind, suffix in (("pictures", ".jpg"), ("kitti", ".txt"), ("labels", ".txt")):
        assert sorted(file.name for file in (out / kind).iterdir()) == [n + suffix for n in names]
    results = json.loads((out / "coco.json").read_text())
    assert len(results) == 5 * FOUND and [r["image_id"] for r in results[::FOUND]] == names
    assert {r["category_id"] for r in results} <= {1, 7}


def test_result_files_hold_everything_and_pictures_what_is_likely(
    toy_bundle: MakeBundle, folder: Path, tmp_path: Path
) -> None:
    bundle, image = toy_bundle(), folder / "right"
    everything = ["--save", "coco", "--save", "kitti", "--save", "yolo"]
    run(bundle, image, "--out", tmp_path / "a", *everything)
    run(bundle, image, "--out", tmp_path / "b", *everything, "--score", "2")
    for name, kept in (("a", FOUND), ("b", 0)):
        assert len(json.loads((tmp_path / name / "coco.json").read_text())) == kept
        assert len((tmp_path / name / "kitti/000004.txt").read_text().splitlines()) == kept
    results = json.loads((tmp_path / "a/coco.json").read_text())
    assert results[0]["image_id"] == 4
    likely = sum(r["score"] >= 0.3 for r in results)
    labels = (tmp_path / "a/labels/000004.txt").read_text().splitlines()
    assert len(labels) == likely
    label, cx, cy, w, h, score = map(float, labels[0].split())
    x, y, width, height = results[0]["bbox"]
    assert (cx * 60, cy * 40) == pytest.approx((x + width / 2, y + height / 2), abs=1e-3)
    assert (w * 60, h * 40, score) == pytest.approx((width, height, results[0]["score"]), abs=1e-3)
    assert label in (0, 1)


def test_kitti_files_are_what_score_reads(toy_bundle: MakeBundle, tmp_path: Path) -> None:
    root = tmp_path / "kitti/training"
    picture(root / "image_2/000007.png")
    (root / "label_2").mkdir()
    (root / "label_2/000007.txt").write_text("")
    run(toy_bundle(), root / "image_2", "--out", tmp_path / "out", "--save", "kitti")
    config = tmp_path / "data.yaml"
    config.write_text("format: kitti\npath: kitti\nclasses: {car: [], tram: []}\n")
    (found,) = read_kitti_folder(tmp_path / "out/kitti", open_dataset(str(config)))
    assert len(found) == FOUND and all(row.score is not None for row in found)


def test_a_limit_ends_it_and_keeps_the_answers(
    toy_bundle: MakeBundle, folder: Path, tmp_path: Path
) -> None:
    (folder / "left/000003.png").write_bytes(b"")
    out = tmp_path / "out"
    options = ["--out", out, "--save", "coco", "--max-skipped", 1]
    with pytest.raises(UserError) as caught:
        run(toy_bundle(), folder, *options)
    assert caught.value.code == "predict-skipped"
    assert len(rows(out / "skipped.csv")) == 2 and len(rows(out / "images.csv")) == 2
    assert len(json.loads((out / "coco.json").read_text())) == 2 * FOUND
    assert not [file for file in out.iterdir() if file.name.startswith(".")]


def test_json_is_whole_also_after_an_early_end(toy_bundle: MakeBundle, folder: Path) -> None:
    result = CliRunner().invoke(
        predict, [str(toy_bundle()), str(folder), "--json", "--max-skipped", "0"]
    )
    assert isinstance(result.exception, UserError)
    answer = json.loads(result.stdout)
    assert len(answer["predictions"]) == 2
    assert [one["code"] for one in answer["skipped"]] == ["image-unreadable"]


def test_results_never_mix_with_those_of_an_earlier_call(
    toy_bundle: MakeBundle, folder: Path, tmp_path: Path
) -> None:
    bundle = toy_bundle()
    run(bundle, folder / "right", "--out", tmp_path / "out", "--save", "coco")
    before = (tmp_path / "out/coco.json").read_bytes()
    with pytest.raises(UserError) as caught:
        run(bundle, folder / "left", "--out", tmp_path / "out", "--save", "coco")
    assert caught.value.code == "output-exists"
    assert (tmp_path / "out/coco.json").read_bytes() == before


def test_ids_that_would_be_the_same_number_stay_names(
    toy_bundle: MakeBundle, tmp_path: Path
) -> None:
    for name in ("7.png", "007.png"):
        picture(tmp_path / "in" / name)
    run(toy_bundle(), tmp_path / "in", "--out", tmp_path / "out", "--save", "coco")
    results = json.loads((tmp_path / "out/coco.json").read_text())
    assert {r["image_id"] for r in results} == {"7", "007"}


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("day", 6),
        ("day/left/*.png", 5),
        ("day/**/000004.*", 2),
    ],
)
def test_folders_and_patterns(folder: Path, given: str, names: int) -> None:
    sources = find_sources([folder.parent / given])
    assert len(sources) == names == len({one.name for one in sources})


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        ("nothing.png", "image-missing", "no such image"),
        ("day/*.bmp", "image-missing", "no file has such a name"),
        ("empty", "images-none", "an empty folder"),
        ("texts", "images-none", "among its 1 file"),
        ("m.bundle", "images-none", "comes first"),
    ],
)
def test_a_path_without_images_is_told_for_what_it_is(
    folder: Path, given: str, code: str, said: str
) -> None:
    for name in ("empty", "texts", "m.bundle"):
        (folder.parent / name).mkdir()
    (folder.parent / "texts/readme.txt").write_text("")
    with pytest.raises(UserError, match=said) as caught:
        find_sources([folder.parent / given])
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        ("net.pth", "model-sidecar", "detr weights import"),
        ("net.safetensors", "model-sidecar", "detr weights import"),
        ("model.onnx", "model-missing", "bundle's folder"),
        ("a.png", "model-missing", "the model comes first"),
        ("pictures", "model-missing", "a folder with 1 image, no model"),
        ("run", "model-missing", "without a model yet"),
        ("texts", "model-missing", "no model among its 1 file"),
    ],
)
def test_a_model_that_is_none_is_told_for_what_it_is(
    tmp_path: Path, given: str, code: str, said: str
) -> None:
    image = picture(tmp_path / "a.png")
    picture(tmp_path / "pictures/b.png")
    for name in ("net.pth", "net.safetensors", "model.onnx", "run/recipe.yaml", "texts/a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"0")
    with pytest.raises(UserError, match=said) as caught:
        run(tmp_path / given, image)
    assert caught.value.code == code


def test_save_needs_a_folder(toy_bundle: MakeBundle, folder: Path) -> None:
    with pytest.raises(UserError) as caught:
        run(toy_bundle(), folder, "--save", "coco")
    assert caught.value.code == "option-save"


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/1.png", "a/2.png"], ["1", "2"]),
        (["a/1.png", "b/1.png", "b/2.png"], ["a_1", "b_1", "b_2"]),
        (["a/1.png", "a/1.jpg"], ["1_png", "1_jpg"]),
        (["../a/1.png", "/a/1.png"], ["000000", "000001"]),
    ],
)
def test_names_take_as_much_of_the_path_as_they_need(paths: list[str], names: list[str]) -> None:
    assert distinct_names([Path(path) for path in paths]) == names


def test_ahead_is_a_few_items_ahead_and_no_more() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for n in range(100):
            made.append(n)
            yield n

    for position, item in enumerate(ahead(items(), 3)):
        assert item == position
        # The one handed out, those that wait, and one the thread holds.
        assert len(made) <= position + 1 + 3 + 1
    assert len(made) == 100


def test_ahead_hands_an_error_on_in_its_place_and_leaves_no_thread() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise ValueError("second")

    seen = ahead(broken(), 2)
    assert next(seen) == 1
    with pytest.raises(ValueError, match="second"):
        next(seen)
    before = threading.active_count()
    endless = ahead(iter(int, 1), 2)
    next(endless)
    assert threading.active_count() == before + 1
    endless.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before
