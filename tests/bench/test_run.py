"""``bench run`` with an engine that really looks at its images."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import CliRunner
from PIL import Image

import bench.opened as bench_opened
import bench.run as bench_run
from bench.artifact import parity_status
from bench.cli import main
from bench.rebuild import commands, rebuild
from bench.report.model import Report
from detr.cli import main as detr
from detr.config import ClassMap
from detr.data.dataset import evenly_spaced
from detr.data.formats.base import FileDataset
from detr.errors import UserError
from detr.files import sha256
from engines.evidence import Evidence
from engines.parity import Budget as ParityBudget
from engines.verdict import EngineVerdict


def models(engines: dict[str, Any]) -> list[Path]:
    return [engine.artifact for engine in engines.values()]


def test_report_of_two_models(engines: dict[str, Any], bright_cars: Path) -> None:
    data = f"kitti:{bright_cars}:val"
    report = bench_run.benchmark(models(engines), data, iterations=3, commands=["again"])
    teacher, student = report.rows
    assert report.reference == "teacher"
    assert teacher.coco.ap == 1.0
    # Shifted by 3 of 30 pixels: IoU 27/33 = 0.82, right for 7 of 10 thresholds.
    assert student.coco.ap == pytest.approx(0.7)
    assert teacher.kitti is not None
    assert teacher.kitti.per_class["Car"].moderate.count == 6
    assert (teacher.size_mb, teacher.parameters) == (0.007, 36)
    assert teacher.sha256 != student.sha256
    assert teacher.latency.count == 3
    assert teacher.environment.machine.packages["onnxruntime"] == "0.0"
    assert len(report.examples) == 4
    assert [p.title for p in report.examples[0].pictures] == ["ground truth", "teacher", "student"]
    for picture in report.examples[0].pictures:
        raw = base64.b64decode(picture.uri.removeprefix("data:image/jpeg;base64,"))
        assert Image.open(io.BytesIO(raw)).size == (640, 320)
        assert picture.boxes == 1


def test_every_image_is_decoded_once(
    engines: dict[str, Any], bright_cars: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    original = FileDataset.image
    monkeypatch.setattr(FileDataset, "image", lambda self, i: reads.append(i) or original(self, i))
    bench_run.benchmark(models(engines), f"kitti:{bright_cars}:val", iterations=1)
    assert reads == [0, 1, 2, 3, 4, 5]
    assert engines["teacher"].seen[:6] == [10, 22, 34, 46, 58, 70]


def test_limit_takes_images_spread_evenly(engines: dict[str, Any], bright_cars: Path) -> None:
    report = bench_run.benchmark(
        models(engines)[:1], f"kitti:{bright_cars}:val", limit=3, iterations=1
    )
    assert report.rows[0].coco.images == 3
    assert report.rows[0].coco.ap == 1.0
    assert engines["teacher"].seen[:3] == [10, 34, 58]
    assert evenly_spaced(10, 4) == [0, 2, 5, 7]
    assert evenly_spaced(2, 5) == [0, 1]
    assert evenly_spaced(0, 5) == []


def test_command_line_writes_the_report(
    engines: dict[str, Any], bright_cars: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a report"
    paths = [str(path) for path in models(engines)]
    run = CliRunner().invoke(
        main,
        [
            *("run", *paths, "--data", f"kitti:{bright_cars}:val", "--iterations", "2", "--json"),
            *("--out", str(out)),
        ],
    )
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout)["rows"][1]["name"] == "student"
    report = Report.model_validate_json((out / "report.json").read_text())
    assert f"'{out}'" in report.commands[0]  # quoted: can be pasted
    assert "data:image/jpeg" in (out / "report.html").read_text()


def test_models_of_other_classes_are_not_compared(
    engines: dict[str, Any], bright_cars: Path
) -> None:
    student = engines["student"]
    other = ClassMap(names=("Car", "Tram"), category_ids=(1, 7))
    student.info = student.info.model_copy(update={"classes": other})
    with pytest.raises(UserError) as caught:
        bench_run.benchmark(models(engines), f"kitti:{bright_cars}:val")
    assert caught.value.code == "bench-classes"
    assert "student.safetensors" in caught.value.message
    assert "Tram" in caught.value.message


def test_the_same_model_twice_gets_a_number(engines: dict[str, Any], bright_cars: Path) -> None:
    path = models(engines)[0]
    report = bench_run.benchmark([path, path], f"kitti:{bright_cars}:val", iterations=20)
    assert [row.name for row in report.rows] == ["teacher", "teacher (2)"]
    assert report.rows[0].speed is None
    speed = report.rows[1].speed
    assert speed is not None and speed.low <= speed.value <= speed.high
    assert speed.text() in report.verdict()[0]


def test_data_without_labels_is_refused_before_anything_is_timed(
    engines: dict[str, Any], bright_cars: Path
) -> None:
    for file in (bright_cars / "training/label_2").iterdir():
        file.write_text("")
    with pytest.raises(UserError) as caught:
        bench_run.benchmark(models(engines), f"kitti:{bright_cars}:val")
    assert caught.value.code == "no-ground-truth" and "--unlabeled" in caught.value.message
    assert engines["teacher"].seen == []


@pytest.mark.parametrize("data", ["kitti:{0}:val", "{0}/training/image_2"])
def test_unlabeled_images_are_timed(
    engines: dict[str, Any], bright_cars: Path, tmp_path: Path, data: str
) -> None:
    for file in (bright_cars / "training/label_2").iterdir():
        file.write_text("")
    command = ["run", *map(str, models(engines)), "--data", data.format(bright_cars)]
    command += ["--unlabeled", "--iterations", "20", "--out", str(tmp_path / "out")]
    done = invoke(command)
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out/timing.json").read_text())
    assert report["images"] == 6 and len(report["rows"]) == 2
    assert report["rows"][1]["speed"]["low"] <= report["rows"][1]["speed"]["value"]
    assert set(engines["student"].seen) == {10, 22, 34, 46, 58, 70}
    assert invoke([*command, "--budget-ms", "0.0001"]).exit_code == 3
    refused = invoke([*command, "--min-ap", "0.5"])
    assert refused.exit_code == 2 and "error[option-unlabeled]" in refused.stderr


def test_more_objects_than_detections_that_count_are_told(
    engines: dict[str, Any], bright_cars: Path
) -> None:
    command = ["run", str(models(engines)[0]), "--data", f"kitti:{bright_cars}:val", "--json"]
    command += ["--iterations", "1"]
    assert "--max-dets" not in invoke(command).stderr
    labels = bright_cars / "training/label_2/000001.txt"
    rows = labels.read_text()
    labels.write_text(rows + rows.replace(" 22 10", " 25 10"))
    info = engines["teacher"].info
    few = info.detector.replace(**{"detections": 1})
    engines["teacher"].info = info.model_copy(update={"detector": few})
    done = invoke([*command, "--max-dets", "1", "--iou", "0.8"])
    assert "teacher: finds at most 1 objects in an image, and one holds 2" in done.stderr
    assert "1 image with more objects of one" in done.stderr
    row = json.loads(done.stdout)["rows"][0]
    assert row["coco"]["max_dets"] == 1 and set(row["coco"]["at_iou"]) == {"0.8"}
    assert "--max-dets 1 --iou 0.8" in json.loads(done.stdout)["commands"][0]


def test_names_take_as_much_of_the_path_as_they_need() -> None:
    assert bench_opened.model_names([Path("a/x.bundle"), Path("b/y.bundle")]) == ["x", "y"]
    assert bench_opened.model_names([Path("a/m.bundle"), Path("b/m.bundle")]) == [
        "a/m.bundle",
        "b/m.bundle",
    ]
    mixed = [Path("runs/s.bundle"), Path("runs/s"), Path("runs/t/model.safetensors")]
    assert bench_opened.model_names(mixed) == ["s.bundle", "s", "t"]


@pytest.mark.parametrize(
    ("budget", "status", "said"),
    [
        (["--budget-ms", "60000", "--min-ap", "0.6"], 0, ""),
        (["--budget-ms", "0.001"], 3, "at most 0.001 ms"),
        (["--min-ap", "0.9"], 3, "student: AP 0.7000 (at least 0.9)"),
    ],
)
def test_a_missed_budget_is_status_3_and_the_report_is_there(
    engines: dict[str, Any],
    bright_cars: Path,
    tmp_path: Path,
    budget: list[str],
    status: int,
    said: str,
) -> None:
    command = ["run", *map(str, models(engines)), "--data", f"kitti:{bright_cars}:val"]
    command += ["--iterations", "2", "--out", str(tmp_path / "out"), *budget]
    run = invoke(command)
    assert run.exit_code == status
    assert said in run.stderr
    report = Report.model_validate_json((tmp_path / "out/report.json").read_text())
    assert bool(report.misses()) == (status == 3)
    assert budget[0] in report.commands[0]
    if status:
        assert run.stderr.splitlines()[-1].startswith("error[bench-budget]")
        assert "teacher: AP" not in run.stderr


def invoke(command: list[str]) -> Any:
    return CliRunner().invoke(main, command)


def test_rows_carry_what_repeating_them_takes(engines: dict[str, Any], bright_cars: Path) -> None:
    report = bench_run.benchmark(models(engines)[:1], f"kitti:{bright_cars}:val", iterations=4)
    row = report.rows[0]
    assert len(row.latency.samples_ms) == row.latency.count == 4
    assert max(row.latency.samples_ms) >= row.latency.end_to_end.p50_ms
    assert row.environment.drift is not None and row.environment.drift.readings >= 1
    assert row.latency.images == 4
    # A checkpoint is its own origin; a bundle's origin is the checkpoint it was made from.
    assert row.checkpoint_sha256 == row.sha256


def test_where_the_report_cannot_lie_is_found_out_before_measuring(
    bright_cars: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench_run, "benchmark", lambda *_: pytest.fail("measured"))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "s.bundle").mkdir()
    for out, code, said in (
        ("file", "output-unwritable", "a file is in the way"),
        ("file/below", "output-unwritable", "a file is in the way"),
        ("s.bundle", "output-exists", "is a bundle"),
    ):
        command = ["run", str(tmp_path / "s.bundle"), "--data", f"kitti:{bright_cars}:val"]
        run = invoke([*command, "--out", str(tmp_path / out)])
        assert run.exit_code == 2
        assert run.stderr.startswith(f"error[{code}]") and said in run.stderr
    assert (tmp_path / "file").read_text() == "mine"
    assert list((tmp_path / "s.bundle").iterdir()) == []


def test_rebuild_builds_and_proves_before_it_measures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("bench.rebuild.open_bundles", lambda path: [SimpleNamespace(path=path)])
    called: list[list[str]] = []

    def answers(*statuses: int) -> Any:
        left = iter(statuses)
        called.clear()
        return lambda command: called.append(list(command)) or next(left)

    rebuild([Path("s.bundle")], "tensorrt", "kitti:k", answers(0, 0))
    assert called[0] == ["export", "trt", "s.bundle", "--backend", "tensorrt"]
    assert called[1][:5] == ["export", "verify", "s.bundle", "--engine", "tensorrt"]
    rebuild([Path("s.bundle")], "native", "kitti:k", answers(0))
    assert [command[1] for command in called] == ["verify"]
    for statuses, code, status in (
        ((0, 3), "rebuild-rejected", 3),
        ((2,), "rebuild-failed", 2),
    ):
        with pytest.raises(UserError) as caught:
            rebuild([Path("s.bundle")], "tensorrt", "kitti:k", answers(*statuses))
        assert (caught.value.code, caught.value.exit_status) == (code, status)
    run = invoke(["run", str(tmp_path), "--data", "kitti:k", "--rebuild"])
    assert run.exit_code == 2 and "error[rebuild-engine]" in run.stderr


def test_rebuild_calls_options_that_exist() -> None:
    for command in commands([Path("s.bundle")], "tensorrt", "kitti:k"):
        found: Any = detr
        for name in command[:2]:
            found = found.get_command(click.Context(found), name)
        known = {option for parameter in found.params for option in parameter.opts}
        assert {word for word in command if word.startswith("--")} <= known


def test_rows_say_what_the_parity_gate_said(tmp_path: Path) -> None:
    model = tmp_path / "model.engine"
    model.write_bytes(b"graph")
    assert parity_status(model, "native") is None
    evidence = Evidence(
        artifact="model.engine", sha256=sha256(model), bundle_sha256="0", backend="tensorrt",
        verdicts={"native": EngineVerdict(
            engine="native", reference="torch", samples="4 golden images", budget=ParityBudget(),
            status="rejected",
        )},
    )  # fmt: skip
    evidence.write(tmp_path)
    assert parity_status(model, "native") == "rejected"
    assert parity_status(model, "openvino") is None
    model.write_bytes(b"another")
    assert parity_status(model, "native") is None


def test_what_the_doctor_calls_an_error_stops_before_anything_is_measured(
    engines: dict[str, Any], bright_cars: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = bright_cars / "training/label_2"
    flat = "Car 0.00 0 0.0 5 5 5 20 1.5 1.6 3.9 0 1.6 20 0\n"
    (labels / "000002.txt").write_text((labels / "000002.txt").read_text() + flat)
    report = bench_run.benchmark(models(engines), f"kitti:{bright_cars}:val", iterations=1)
    assert "1 warning (box-empty 1)" in capsys.readouterr().err
    kitti = report.rows[0].kitti
    assert report.rows[0].coco.n_gt == 6
    assert kitti is not None and kitti.per_class["Car"].easy.count == 6
    engines["teacher"].seen.clear()
    (labels / "000003.txt").write_text(flat.replace("5 5 5 20", "500 5 520 20"))
    with pytest.raises(UserError) as caught:
        bench_run.benchmark(models(engines), f"kitti:{bright_cars}:val", iterations=1)
    assert caught.value.code == "box-outside" and engines["teacher"].seen == []
