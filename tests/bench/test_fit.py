"""The best bundle within a budget."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

from bench.cli import main
from bench.fit.choose import candidates, choose
from bench.fit.model import Candidate, Fit
from bench.fit.picture import picture
from bench.report.model import Report, ReportRow
from detr.errors import UserError
from tools.elastic import choice


def row(report: Report, name: str, ap: float, p90: float) -> ReportRow:
    like = report.rows[0]
    both = like.latency.end_to_end.model_copy(update={"p90_ms": p90, "p50_ms": 0.9 * p90})
    latency = like.latency.model_copy(update={"end_to_end": both})
    coco = like.coco.model_copy(update={"ap": ap})
    return like.model_copy(update={"name": name, "coco": coco, "latency": latency})


def test_the_best_beside_its_neighbours_is_kept(report: Report) -> None:
    """Timed again are the most accurate near the budget, in turns, and no more than it takes."""
    found = [("huge", 0.6, 30.0), ("unlucky", 0.55, 21.0), ("lucky", 0.45, 19.0)]
    found += [("good", 0.4, 18.0), ("fair", 0.35, 12.0), ("small", 0.3, 9.0)]
    rows = [row(report, *one) for one in found]
    asked: list[list[str]] = []

    def again(changed: dict[str, float]) -> Callable[[Sequence[ReportRow]], list[ReportRow]]:
        def times(group: Sequence[ReportRow]) -> list[ReportRow]:
            asked.append([one.name for one in group])
            p90 = {one.name: one.latency.end_to_end.p90_ms for one in group} | changed
            return [row(report, one.name, one.coco.ap, p90[one.name]) for one in group]

        return times

    kept, second = choose(rows, 20.0, again({"lucky": 24.0}))
    assert kept is not None and kept.name == "good"
    assert asked == [["unlucky", "lucky", "good", "fair"]] and list(second) == asked[0]
    assert second["lucky"].latency.end_to_end.p90_ms == 24.0
    # One that was over the budget by what a second measurement may take off gets its chance.
    kept, _ = choose(rows, 20.0, again({"unlucky": 19.5}))
    assert kept is not None and kept.name == "unlucky"
    # The next ones are asked where none of the first holds it; none is kept where nobody does.
    slow = {name: 25.0 for name in ("unlucky", "lucky", "good", "fair")}
    kept, second = choose(rows, 20.0, again(slow))
    assert kept is not None and kept.name == "small" and len(second) == 5
    assert choose(rows, 20.0, again(slow | {"small": 25.0}))[0] is None
    assert choose(rows, 5.0, again({})) == (None, {})


def test_of_equals_the_faster_is_kept(report: Report) -> None:
    """By the second measurement."""
    rows = [row(report, "slow", 0.4, 8.0), row(report, "fast", 0.4, 18.0)]
    now = [row(report, "slow", 0.4, 18.0), row(report, "fast", 0.4, 8.0)]
    kept, _ = choose(rows, 20.0, lambda _: now)
    assert kept is not None and kept.name == "fast"


def test_another_measurement_confirms_the_choice_or_not(
    report: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What docs/results.md says of a choice is what this tool says."""

    def confirmed(kept: str, found: list[tuple[str, float, float]]) -> int:
        fit = Fit(
            data="x", engine="x", created="x", budget_ms=20.0, kept=kept, candidates=[],
            skipped=[], commands=[],
        )  # fmt: skip
        again = report.model_copy(update={"rows": [row(report, *one) for one in found]})
        (tmp_path / "fit.json").write_text(fit.model_dump_json())
        (tmp_path / "report.json").write_text(again.model_dump_json())
        with pytest.raises(SystemExit) as caught:
            choice(tmp_path / "fit.json", tmp_path / "report.json")
        assert isinstance(caught.value.code, int)
        return caught.value.code

    found = [("large", 0.5, 30.0), ("good", 0.4, 18.0), ("small", 0.3, 9.0)]
    assert confirmed("good", found) == 0
    told = capsys.readouterr().out
    assert "kept good: p90 18.00 ms, 0.900 of the budget" in told
    assert "best of 3 by the report: good; its front: " in told
    assert confirmed("small", found) == 1
    # Another is as good and faster; nothing holds the budget; the kept one was not measured.
    assert confirmed("good", [*found, ("quick", 0.4, 8.0)]) == 1
    assert confirmed("good", [("good", 0.4, 21.0)]) == 1
    assert confirmed("good", found[:1]) == 1


def test_the_picture_names_the_front_and_tells_the_rest_by_hand(report: Report) -> None:
    """The kept one lies on top, beaten ones keep their names for the mouse."""
    found = [("e1-d1-96x320", 0.2, 10.0), ("e1-d2-96x320", 0.3, 12.0), ("e2-d1-96x320", 0.25, 13.0)]
    rows = [
        Candidate(
            name=name, artifact=name, encoder_layers=1, decoder_layers=1, ap=ap,
            min_ms=0.9 * ms, ms=ms, p90_ms=1.1 * ms, again=ms < 11, within=ms < 11,
            pareto=ap != 0.25,
        )
        for name, ap, ms in found
    ]  # fmt: skip
    fit = Fit(
        data="x", engine="x", created="x", budget_ms=11.5, kept=found[0][0],
        candidates=rows, skipped=[], commands=[],
    )  # fmt: skip
    svg = picture(fit)
    ElementTree.fromstring(svg)
    assert re.findall(r'class="label"[^>]*>([^<]*)<', svg) == ["e1-d2", "e1-d1"]
    titles = re.findall(r"<title>([^:<]*): ", svg)
    assert titles == ["e2-d1-96x320", "e1-d2-96x320", "e1-d1-96x320"]
    assert ">budget 11.5 ms<" in svg
    # The axis begins near the fastest, or a cluster would be unreadable.
    places = [float(x) for x in re.findall(r'cx="([\d.]+)"', svg)]
    assert min(places) < 400 < 700 < max(places)


def test_a_folder_stands_for_its_bundles(tmp_path: Path) -> None:
    for name in ("b.bundle", "a.bundle", "models"):
        (tmp_path / "all" / name).mkdir(parents=True)
    single = tmp_path / "c.bundle"
    single.mkdir()
    found = candidates([single, tmp_path / "all"])
    assert [path.name for path in found] == ["c.bundle", "a.bundle", "b.bundle"]
    with pytest.raises(UserError, match="neither a bundle nor") as caught:
        candidates([tmp_path / "all" / "models"])
    assert caught.value.code == "fit-empty"
    with pytest.raises(UserError, match="no such bundle") as caught:
        candidates([single, tmp_path / "nosuch"])
    assert caught.value.code == "model-missing"


def command(models: list[Path], data: Path, out: Path, budget: str) -> Any:
    arguments = ["fit", *map(str, models), "--data", f"kitti:{data}:val", "--out", str(out)]
    arguments += ["--engine", "onnxruntime", "--iterations", "20", "--budget-ms", budget]
    return CliRunner().invoke(main, [*arguments, "--json"])


def test_the_command_writes_choice_picture_and_report(
    engines: dict[str, Any], bright_cars: Path, tmp_path: Path
) -> None:
    models = [engine.artifact for engine in engines.values()]
    result = command(models, bright_cars, tmp_path / "out", "10000")
    assert result.exit_code == 0, result.output
    told = Fit.model_validate(json.loads(result.stdout))
    assert told.best is not None
    assert (told.best.name, told.best.ap) == ("teacher", 1.0)
    assert told == Fit.model_validate_json((tmp_path / "out" / "fit.json").read_text())
    assert [c.within for c in told.candidates] == [True, True]
    assert all(c.again for c in told.candidates) and "--budget-ms 10000" in told.commands[0]
    ElementTree.fromstring((tmp_path / "out" / "fit.svg").read_text())
    written = Report.model_validate_json((tmp_path / "out" / "report.json").read_text())
    assert [r.model for r in written.rows] == list(engines)
    assert "kept" in told.text()


def test_a_budget_that_nobody_holds_is_status_3(
    engines: dict[str, Any], bright_cars: Path, tmp_path: Path
) -> None:
    models = [engine.artifact for engine in engines.values()]
    result = command(models, bright_cars, tmp_path / "out", "0.000001")
    assert result.exit_code == 3
    assert "error[fit-budget]" in result.stderr and "none of 2 candidates" in result.stderr
    assert json.loads((tmp_path / "out" / "fit.json").read_text())["kept"] is None
