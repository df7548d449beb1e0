"""Slices by labels and by a user's table, and the pages that show them."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import bench.opened as bench_opened
import bench.run as bench_run
from bench.analysis.model import Analysis
from bench.analysis.properties import label_properties, table_properties
from bench.cli import main
from bench.report.analysis import shown
from bench.report.write import write_report
from bench.score import score
from detr.data import open_dataset
from detr.errors import UserError
from detr.metrics.confusion import Confusion
from detr.metrics.slices import Slice, Slices
from engines.base import Engine
from engines.cli import predict

# Occlusion, truncation and place (right, down, ahead) of the car in each of the six frames.
FACTS = [(0, 0.0, (0, 1, 6)), (0, 0.1, (9, 1, 12)), (1, 0.4, (0, 1, 25)),
         (1, 0.0, (3, 1, 40)), (2, 0.9, (0, 1, 70)), (3, 0.0, (-1000, -1000, -1000))]  # fmt: skip


@pytest.fixture
def cars(bright_cars: Path) -> Path:
    for n, (occluded, truncated, place) in enumerate(FACTS):
        x = 10 + 12 * n
        where = " ".join(map(str, place))
        (bright_cars / f"training/label_2/{n:06d}.txt").write_text(
            "DontCare -1 -1 -10 0 0 5 5 -1 -1 -1 -1000 -1000 -1000 -10\n"
            f"Car {truncated} {occluded} 0.0 {x} 10 {x + 30} 55 1.5 1.6 3.9 {where} 0\n"
        )
    return bright_cars


@pytest.fixture
def models(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, engine_type: type[Any]
) -> dict[str, Engine]:
    """``right`` finds every car, ``wrong`` looks 20 pixels beside it."""
    made = {}
    for name, shift in (("right", 0.0), ("wrong", 20.0)):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes((2).to_bytes(8, "little") + b"{}" + name.encode())
        made[name] = engine_type(path, shift)
    monkeypatch.setattr(bench_opened, "open_engine", lambda path, engine, threads: made[path.stem])
    return made


def test_kitti_labels_tell_occlusion_truncation_and_distance(cars: Path) -> None:
    dataset = open_dataset(f"kitti:{cars}:val")
    found = {one.by: one for one in label_properties(dataset, range(6))}
    own = {by: [v for v in one.values if v is not None] for by, one in found.items()}
    assert own["occlusion"] == ["visible", "visible", "partly", "partly", "largely", "unknown"]
    assert own["truncation"] == ["0", "0 – 0.15", "0.3 – 0.5", "0", "> 0.5", "0"]
    assert own["distance"] == ["≤ 10 m", "10 – 20 m", "20 – 30 m", "30 – 50 m", "> 50 m"]
    assert set(own["class"]) == {"Car"} and found["class"].order == ["Car"]
    assert found["occlusion"].order == ["visible", "partly", "largely", "unknown"]
    # One entry per row of the COCO document: DontCare is one of every class.
    assert {len(one.values) for one in found.values()} == {6 * (len(dataset.classes) + 1)}


@pytest.mark.parametrize(
    ("text", "of", "values", "order"),
    [
        # By number, by file name, by name without suffix; others are not told.
        ("image,sky\n0,rain\n000001.png,dry\n000002,dry\n", "images",
         ["rain", "dry", "dry", *["(not told)"] * 3], ["dry", "rain", "(not told)"]),
        ("image,n\n0,10\n1,9\n2,2\n3,2\n4,2\n5,2\n", "images",
         ["10", "9", "2", "2", "2", "2"], ["2", "9", "10"]),
        ("image,n\n0,10\n1,nan\n2,2\n3,2\n4,2\n5,2\n", "images",
         ["10", "nan", "2", "2", "2", "2"], ["10", "2", "nan"]),
        ("image,object,pose\n0,2,left\n1,2,right\n", "objects",
         ["left", "right", *["(not told)"] * 4], ["left", "right", "(not told)"]),
    ],
)  # fmt: skip
def test_a_users_table(
    cars: Path, tmp_path: Path, text: str, of: str, values: list[str], order: list[str]
) -> None:
    table = tmp_path / "table.csv"
    table.write_text("\ufeff" + text)
    dataset = open_dataset(f"kitti:{cars}:val")
    (found,) = table_properties(table, dataset, range(6))
    assert (found.of, found.order) == (of, order)
    told = found.values if of == "images" else found.values[len(dataset.classes) :: 8]
    assert told == values


def test_many_numbers_are_cut_at_their_quartiles(tmp_path: Path, cars: Path) -> None:
    rows = "".join(f"{n},{n * 10}\n" for n in range(6))
    for n in range(6, 20):
        source = cars / "training/image_2/000000.png"
        (cars / f"training/image_2/{n:06d}.png").write_bytes(source.read_bytes())
        label = (cars / "training/label_2/000000.txt").read_text()
        (cars / f"training/label_2/{n:06d}.txt").write_text(label)
        rows += f"{n},{n * 10}\n"
    (tmp_path / "t.csv").write_text("image,lux\n" + rows)
    (found,) = table_properties(tmp_path / "t.csv", open_dataset(f"kitti:{cars}"), range(20))
    assert found.order == ["≤ 47.5", "47.5 – 95", "95 – 142.5", "> 142.5"]
    assert [found.values.count(value) for value in found.order] == [5, 5, 5, 5]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ":1: needs a column image"),
        ("image\n0\n", ":1: needs a column image"),
        ("frame,sky\n0,dry\n", "not frame, sky"),
        ("image,sky,sky\n0,dry,dry\n", ":1: needs"),
        ("image,sky\n0,dry\n77,dry\n", ":3: image '77' is not in kitti:"),
        ("image,sky\n0,dry\n0,dry\n", ":3: the same image a second time"),
        ("image,sky\n0,dry,wet\n", ":2: not 2 columns"),
        ("image,sky\n0\n", ":2: not 2 columns"),
        ("image,object,pose\n0,9,left\n", ":2: 000000.png has no object '9'"),
    ],
)
def test_a_bad_table_is_told_with_its_line(
    cars: Path, tmp_path: Path, text: str, said: str
) -> None:
    table = tmp_path / "table.csv"
    table.write_text(text)
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        table_properties(table, open_dataset(f"kitti:{cars}:val"), range(6))
    assert caught.value.code == "slices-file"


def test_a_missing_table_stops_before_anything_is_measured(
    models: dict[str, Any], cars: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        bench_run.benchmark(
            [models["right"].artifact], f"kitti:{cars}:val", slices=tmp_path / "none.csv"
        )
    assert caught.value.code == "slices-file" and models["right"].seen == []


def test_a_report_has_slices_confusions_and_mistakes(
    models: dict[str, Any], cars: Path, tmp_path: Path
) -> None:
    (tmp_path / "table.csv").write_text("image,sky\n" + "".join(f"{n},dry\n" for n in range(6)))
    report = bench_run.benchmark(
        [one.artifact for one in models.values()], f"kitti:{cars}:val", iterations=1,
        slices=tmp_path / "table.csv",
    )  # fmt: skip
    right, wrong = (row.analysis for row in report.rows)
    assert right is not None and wrong is not None
    assert right.curves["all"] == [1.0] * 101 and wrong.curves["all"] == [0.0] * 101
    by = {table.by: table for table in right.slices}
    assert by["distance"].rows[0].value == "≤ 10 m"
    assert by["sky"].of == "images" and by["sky"].rows[0].images == 6
    assert [row.recall for row in by["occlusion"].rows] == [1.0] * 4
    assert right.confused() == []
    assert wrong.confused() == ["6 Car missed", "6 Car where there is none"]
    # Only who made mistakes has pictures of them: four of each kind.
    (mistakes,) = report.mistakes
    assert mistakes.title == "wrong" and len(mistakes.pictures) == 8
    assert mistakes.pictures[0].title.startswith("Car where there is none, 00000")

    write_report(report, tmp_path / "out")
    with (tmp_path / "out/slices.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["name"] for row in rows} == {"right", "wrong"}
    (near,) = (r for r in rows if (r["name"], r["value"]) == ("right", "≤ 10 m"))
    assert (near["objects"], near["found"], near["recall"]) == ("1", "1", "1.0")
    page = (tmp_path / "out/report.html").read_text()
    for said in ("Precision over recall", "10 – 20 m", "6 Car missed", "Worst mistakes"):
        assert said in page
    text = (tmp_path / "out/report.md").read_text()
    assert "| ≤ 10 m | 1 | 100.0, 100.0 (20.7 – 100.0) |" in text
    stored = json.loads((tmp_path / "out/report.json").read_text())
    assert "mistakes" not in stored and "data:image" not in json.dumps(stored)


def test_score_has_the_same_and_a_page(cars: Path, tmp_path: Path) -> None:
    results = [
        {"image_id": n, "category_id": 1, "bbox": [10 + 12 * n, 10, 30, 45], "score": 0.9}
        for n in range(5)
    ]
    (tmp_path / "<found>.json").write_text(json.dumps(results))
    run = CliRunner().invoke(
        main,
        ["score", str(tmp_path / "<found>.json"), "--data", f"kitti:{cars}:val", "--iou", "0.3",
         "--out", str(tmp_path / "out")],
    )  # fmt: skip
    assert run.exit_code == 0, run.output
    assert "AP at IoU 0.3: 83.2" in run.stdout  # found at 84 of 101 recalls
    assert "most frequent mistakes: 1 Car missed" in run.stdout
    assert re.search(r"unknown +1 +0\.0 +0\.0 +0\.0 \(0\.0 – 79\.3\)", run.stdout)
    page = (tmp_path / "out/score.html").read_text()
    assert "&lt;found&gt;.json" in page and "<found>" not in page
    assert "Car missed, 000005.png" in page and "data:image/jpeg" in page
    stored = json.loads((tmp_path / "out/score.json").read_text())
    assert stored["analysis"]["confusion"]["counts"][0][-1] == 1
    assert stored["coco"]["ar"] == pytest.approx(5 / 6)


@pytest.mark.parametrize("kind", ["coco", "kitti"])
def test_predict_and_score_give_what_a_benchmark_gives(
    models: dict[str, Any],
    cars: Path,
    tmp_path: Path,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models["wrong"].shift = 3.0
    report = bench_run.benchmark([models["wrong"].artifact], f"kitti:{cars}:val", iterations=1)
    monkeypatch.setattr("engines.cli.open_engine", lambda *_: models["wrong"])
    done = CliRunner().invoke(
        predict,
        [str(models["wrong"].artifact), str(cars / "training/image_2"), "--save", kind,
         "--out", str(tmp_path / "out")],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    found = tmp_path / "out" / ("coco.json" if kind == "coco" else "kitti")
    scored = score(found, open_dataset(f"kitti:{cars}:val"), "coco")
    row = report.rows[0]
    assert scored.coco is not None and scored.analysis is not None and row.analysis is not None
    assert (scored.coco.ap, scored.coco.ar) == (row.coco.ap, row.coco.ar)
    assert 0.5 < row.coco.ap < 1
    assert scored.analysis.slices == row.analysis.slices
    assert scored.analysis.curves == row.analysis.curves


def test_a_page_of_many_classes_and_artifacts_lists_what_matters() -> None:
    names = [f"class{k}" for k in range(13)]
    counts = np.eye(14, dtype=int)
    counts[2, 5], counts[13, 13] = 40, 0
    rows = [Slice(value=name, images=1, objects=1, found=1, ap=1.0, ap50=1.0) for name in names]
    one = Analysis(
        score=0.3,
        iou=0.5,
        curves={"all": [1.0] * 101, **{name: [1.0] * 101 for name in names}},
        confusion=Confusion(names=names, counts=counts.tolist()),
        slices=[Slices(by="class", of="objects", rows=rows)],
    )
    page = shown({f"m{k}": one for k in range(8)}, {f"m{k}": "red" for k in range(8)})
    assert page is not None
    assert (page.matrices, page.small, page.tables, page.left_out) == ({}, [], [], 2)
    assert page.confused["m0"] == ["40 class2 taken for class5"]
    assert one.text() == ["most frequent mistakes: 40 class2 taken for class5"]
    assert shown({}, {}) is None
