"""Reports of several runs, trainings and machines: what is merged, tested and not claimed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import bench.run as bench_run
from bench.cli import main
from bench.compare.merge import compare_reports
from bench.compare.model import Difference, ReportComparison
from bench.compare.page import write_comparison
from bench.report.model import Report, ReportRow
from bench.report.write import write_report
from detr.errors import UserError

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, report: Report) -> Write:
    """Writes a report whose rows are teacher and student, changed as asked."""

    def make(folder: str, teacher: dict[str, Any], student: dict[str, Any]) -> Path:
        rows = [
            changed(row, **changes)
            for row, changes in ((report.rows[0], teacher), (report.rows[2], student))
        ]
        copy = report.model_copy(update={"rows": rows, "examples": []})
        write_report(copy, tmp_path / folder)
        return tmp_path / folder

    return make


def changed(
    row: ReportRow, ms: float | None = None, ap: float | None = None, sha: str | None = None,
    cpu: str | None = None, spread: float = 0.0, checkpoint: str | None = None,
) -> ReportRow:  # fmt: skip
    row = row.model_copy(deep=True)
    if ms is not None:
        samples = ms + spread * np.random.default_rng(round(ms * 1000)).normal(size=60)
        row.latency.samples_ms = samples.tolist()
        row.latency.end_to_end.p50_ms = float(np.median(samples))
    row.coco.ap = row.coco.ap if ap is None else ap
    row.sha256 = row.sha256 if sha is None else sha * 64
    row.checkpoint_sha256 = None if checkpoint is None else checkpoint * 64
    if cpu is not None:
        row.environment.machine.cpu = cpu
    return row


def test_an_engine_built_twice_is_one_training(write: Write) -> None:
    weights = {"checkpoint": "e"}
    folders = [
        write(f"run{k}", {"checkpoint": "a"}, {**weights, "sha": str(k), "ap": 0.48 + k / 1000})
        for k in range(2)
    ]
    comparison = compare_reports(folders)
    assert [entry.trainings for entry in comparison.entries] == [1, 1]
    assert not [d for d in comparison.differences if "trainings" in d.method]
    student = comparison.entries[1]
    assert (student.runs, student.ap) == (2, pytest.approx(0.4805))
    assert "2 runs of 1 training" in comparison.text()


def test_a_report_of_a_later_release_is_named_as_one(write: Write) -> None:
    folder = write("new", {}, {})
    text = (folder / "report.json").read_text().replace('"format": 1', '"format": 2, "new": 0', 1)
    (folder / "report.json").write_text(text)
    with pytest.raises(UserError, match=r"format:? 2 is another release's") as caught:
        compare_reports([folder])
    assert caught.value.code == "report-unreadable"


def difference(comparison: ReportComparison, quantity: str, entry: str = "student") -> Difference:
    return next(d for d in comparison.differences if (d.quantity, d.entry) == (quantity, entry))


def test_repeated_runs_are_one_entry_and_carry_a_claim(write: Write) -> None:
    folders = [
        write(f"run{k}", {"ms": 100.0 + k, "spread": 1}, {"ms": 40.0 + k / 2, "spread": 1})
        for k in range(3)
    ]
    comparison = compare_reports(folders)
    teacher, student = comparison.entries
    assert (teacher.name, teacher.runs, teacher.trainings) == ("teacher", 3, 1)
    assert student.ms == pytest.approx(40.5, abs=0.5)
    assert student.ms_low < student.ms < student.ms_high
    speed = difference(comparison, "latency")
    assert speed.significant
    assert speed.low < 2.49 < speed.high and speed.low > 2
    assert "over the medians of 3 and 3 runs" in speed.method
    assert any("certified" in note for note in comparison.notes)


def test_one_run_each_shows_an_interval_and_claims_nothing(write: Write) -> None:
    comparison = compare_reports(
        [write("a", {"ms": 100.0, "spread": 2}, {"ms": 50.0, "spread": 2})]
    )
    speed = difference(comparison, "latency")
    assert speed.low < 2.0 < speed.high
    assert speed.p < 0.01 and not speed.significant
    assert "not claimable" in speed.sentence() and "repeat bench run" in speed.sentence()


def test_equal_speed_is_not_shown_to_differ(write: Write) -> None:
    folders = [write(f"run{k}", {"ms": 40.0 + k}, {"ms": 40.0 + (k + 1) % 3}) for k in range(3)]
    speed = difference(compare_reports(folders), "latency")
    assert not speed.significant and speed.low < 1 < speed.high
    assert "not shown to differ" in speed.sentence()


def test_a_sweeps_row_is_a_repeat_of_the_same_model_in_the_same_engine(write: Write) -> None:
    folders = [write(name, {"ms": 100.0}, {"ms": 40.0}) for name in ("run", "sweep")]
    path = folders[1] / "report.json"
    path.write_text(path.read_text().replace('"name": "student"', '"name": "student onnxruntime"'))
    assert {entry.name: entry.runs for entry in compare_reports(folders).entries} == {
        "teacher": 2, "student": 2,
    }  # fmt: skip


def test_trainings_are_told_by_their_files(write: Write) -> None:
    folders = []
    for k in range(3):
        teacher = {"ap": 0.5 + k / 100, "sha": f"{k}"}
        folders.append(write(f"seed{k}", teacher, {"ap": 0.4 + k / 100, "sha": f"{k + 5}"}))
    comparison = compare_reports(folders)
    student = comparison.entries[1]
    assert (student.trainings, student.runs) == (3, 3)
    assert (student.ap_low, student.ap_high) == pytest.approx((0.4, 0.42))
    gap = difference(comparison, "AP")
    assert gap.significant and gap.value == pytest.approx(-0.1)
    assert "3 and 3 trainings" in gap.method


def test_one_training_against_several_is_no_claim(write: Write) -> None:
    folders = [
        write(f"seed{k}", {"sha": "1"}, {"ap": 0.4 + k / 100, "sha": f"{k + 5}"}) for k in range(2)
    ]
    comparison = compare_reports(folders)
    assert not any(d.quantity == "AP" for d in comparison.differences)
    assert any("train both at least twice" in note for note in comparison.notes)


def test_machines_have_fronts_of_their_own(write: Write) -> None:
    folders = [
        write("desk", {"ms": 100.0}, {"ms": 40.0}),
        write("orin", {"ms": 300.0, "cpu": "Orin"}, {"ms": 350.0, "cpu": "Orin"}),
    ]
    comparison = compare_reports(folders)
    assert list(comparison.machines) == ["A", "B"]
    fronts = {entry.name for entry in comparison.entries if entry.pareto}
    assert fronts == {"teacher on A", "student on A", "teacher on B"}
    found = [(d.quantity, d.entry, d.reference) for d in comparison.differences]
    assert found == [
        ("latency", "student on A", "teacher on A"),
        ("latency", "student on B", "teacher on B"),
    ]
    # One artifact is one AP, wherever it ran.
    assert sum("AP of student" in note for note in comparison.notes) == 1
    assert any("different machines" in note for note in comparison.notes)


def test_without_outcomes_an_ap_difference_is_not_claimed(write: Write) -> None:
    comparison = compare_reports([write("a", {}, {})])
    assert any("no matches.npz" in note for note in comparison.notes)


def measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, engine_type: Any, data: Path, student: float
) -> Path:
    made = {}
    for name, shift in (("teacher", 0.0), ("student", student)):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes((2).to_bytes(8, "little") + b"{}" + name.encode())
        made[name] = engine_type(path, shift)
    monkeypatch.setattr("bench.opened.open_engine", lambda path, engine, threads: made[path.stem])
    paths = [engine.artifact for engine in made.values()]
    report = bench_run.benchmark(paths, f"kitti:{data}:val", iterations=4)
    write_report(report, tmp_path / f"report{student:g}")
    return tmp_path / f"report{student:g}"


def test_ap_is_tested_over_images_from_a_real_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, engine_type: Any, bright_cars: Path
) -> None:
    worse = measured(monkeypatch, tmp_path, engine_type, bright_cars, 3.0)
    gap = difference(compare_reports([worse]), "AP")
    # Every image loses the same three of ten thresholds: no resampling changes that.
    assert (gap.value, gap.low, gap.high) == pytest.approx((-0.3, -0.3, -0.3))
    assert not gap.significant and "not claimable" in gap.sentence()
    assert "6 images" in gap.method and "fewer than 30 images claim nothing" in gap.scope
    monkeypatch.setattr("bench.compare.merge._LEAST_IMAGES", 6)
    assert difference(compare_reports([worse]), "AP").significant
    same = measured(monkeypatch, tmp_path, engine_type, bright_cars, 0.0)
    gap = difference(compare_reports([same]), "AP")
    assert gap.value == 0 and gap.p == 1 and not gap.significant


def test_page_and_markdown(write: Write, tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    folders = [write(f"r{k}", {"ms": 100.0 + k}, {"ms": 40.0 + k, "cpu": None}) for k in range(2)]
    comparison = compare_reports(folders)
    comparison.notes.append(evil)
    paths = write_comparison(comparison, tmp_path / "out")
    assert [p.name for p in paths] == ["compare.json", "compare.md", "compare.html"]
    assert ReportComparison.model_validate_json(paths[0].read_text()) == comparison
    html = paths[2].read_text()
    assert "<script" not in html and "http" not in html.replace("&#", "")
    assert html.count("<svg") == 1 and "Welch" in html
    lines = paths[1].read_text().splitlines()
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (lambda a, b: [a, b, a / "report.json"], "compare-twice"),
        (lambda a, b: [a, a.parent / "none"], "report-unreadable"),
        (lambda a, b: [(a / "report.json").write_text("{}") and a], "report-unreadable"),
        (lambda a, b: [(b / "matches.npz").write_text("x") and a, b], "matches-unreadable"),
    ],
)
def test_mistakes_are_told_in_one_line(write: Write, damage: Any, code: str) -> None:
    paths = damage(write("a", {}, {}), write("b", {}, {}))
    with pytest.raises(UserError) as caught:
        compare_reports(paths)
    assert caught.value.code == code and "\n" not in caught.value.message


def test_other_data_does_not_compare(write: Write, report: Report, tmp_path: Path) -> None:
    a = write("a", {}, {})
    report.rows[0].coco.images = 76
    write_report(report, tmp_path / "other")
    with pytest.raises(UserError) as caught:
        compare_reports([a, tmp_path / "other"])
    assert caught.value.code == "compare-data"


def test_command_line(write: Write, tmp_path: Path) -> None:
    folders = [str(write(f"r{k}", {}, {})) for k in range(2)]
    run = CliRunner().invoke(main, ["compare", *folders, "--out", str(tmp_path / "c")])
    assert run.exit_code == 0, run.output
    assert "* student: 48.0 AP, 40.00 ms" in run.stdout
    assert (tmp_path / "c/compare.html").exists()
