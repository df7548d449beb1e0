"""The report renders itself, escapes what it is given and reads back."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bench.report.html import render_html
from bench.report.markdown import render_markdown
from bench.report.model import PerformanceBudget, Report
from bench.report.write import write_report
from detr.errors import UserError
from detr.plot import Axis, Point, ap_over_latency, nice_step
from tests.bench.conftest import make_row

RECORDED = Path(__file__).parent / "recorded" / "report_format1.json"
_VOID = {"meta", "img", "br", "link"}


class Balance(HTMLParser):
    """Fails on a tag that is not closed, collects text and addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href")]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def parse(html: str) -> Balance:
    parser = Balance()
    parser.feed(html)
    assert parser.open == []
    return parser


def test_verdict_compares_with_the_reference(report: Report) -> None:
    assert report.verdict() == [
        "student: 48.0 AP at 40.0 ms = 96 % of teacher's AP (50.0) at 2.5 times its speed "
        "(100.0 ms)",
        "baseline: 40.0 AP at 40.0 ms = 80 % of teacher's AP (50.0) at 2.5 times its speed "
        "(100.0 ms)",
    ]
    alone = report.model_copy(update={"rows": report.rows[:1]})
    assert alone.verdict() == ["teacher: 50.0 AP at 100.0 ms"]


def test_first_sentence_tells_how_far_above_the_same_network_trained_otherwise(
    report: Report,
) -> None:
    teacher, baseline, student = report.rows
    inherited = make_row("inherited", 0.45, 41.0)
    for row in (baseline, inherited, student):
        row.parameters = 1000
    rows = [teacher, baseline, inherited, student, make_row("other", 0.3, 20.0)]
    first, *others = report.model_copy(update={"rows": rows}).verdict()
    assert first.endswith(
        "(100.0 ms); 3.0 above inherited and 8.0 above baseline, the same network"
    )
    assert len(others) == 3 and not any("above" in sentence for sentence in others)
    baseline.precision, inherited.encoder_layers = "fp16", 2
    assert "above" not in report.model_copy(update={"rows": rows}).verdict()[0]


def test_a_reference_that_finds_nothing_does_not_divide_by_zero(report: Report) -> None:
    rows = [row.model_copy(deep=True) for row in report.rows]
    rows[0].coco.ap = 0.0
    assert (
        "no meaningful share of teacher's AP (0.0)"
        in report.model_copy(update={"rows": rows}).verdict()[0]
    )


def test_pareto_front_leaves_out_what_is_beaten(report: Report) -> None:
    assert [row.name for row in report.pareto()] == ["student", "teacher"]


def test_json_round_trip_without_pictures(report: Report) -> None:
    again = Report.model_validate_json(report.to_json())
    assert again == report.model_copy(update={"examples": []})
    with pytest.raises(ValueError, match="Extra inputs"):
        Report.model_validate_json(report.to_json().replace('"created"', '"creatd"'))


def without_nulls(value: Any) -> Any:
    """What later versions add is null in reports of the first."""
    if isinstance(value, dict):
        return {key: without_nulls(x) for key, x in value.items() if x is not None}
    return [without_nulls(x) for x in value] if isinstance(value, list) else value


def test_a_report_of_the_first_version_reads_and_writes_the_same_keys() -> None:
    """Written by version 0.1: old reports are compared with new ones for years."""
    recorded = RECORDED.read_text()
    report = Report.model_validate_json(recorded)
    assert without_nulls(json.loads(report.to_json())) == without_nulls(json.loads(recorded))
    assert report.misses() == [] and report.rows[1].artifact == "runs/demo/student.bundle"


def test_csv_has_a_line_per_artifact(report: Report) -> None:
    rows = list(csv.DictReader(report.to_csv().splitlines()))
    assert [row["name"] for row in rows] == ["teacher", "baseline", "student"]
    assert float(rows[2]["ap"]) == 0.48
    assert float(rows[2]["end_to_end_p50_ms"]) == 40
    assert float(rows[2]["kitti_Car_moderate_ap40"]) == pytest.approx(0.4704)
    assert rows[2]["ap_small"] == ""


def test_csv_columns_do_not_depend_on_the_first_row(report: Report) -> None:
    first = report.rows[0].model_copy(update={"kitti": None})
    mixed = report.model_copy(update={"rows": [first, *report.rows[1:]]})
    rows = list(csv.DictReader(mixed.to_csv().splitlines()))
    assert rows[0]["kitti_Car_easy_ap11"] == ""
    assert rows[1]["kitti_Car_easy_ap11"] == "0.4"
    parse(render_html(mixed))
    render_markdown(mixed)


def test_markdown_tables_are_rectangular(report: Report) -> None:
    report.rows[0].name = report.reference = "tea|cher"
    text = render_markdown(report)
    for block in text.split("\n\n"):
        if block.startswith("|"):
            widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
            assert len(widths) == 1
    assert "tea\\|cher" in text
    assert "detr bench run teacher.bundle" in text


def test_html_is_well_formed_and_needs_nothing_else(report: Report) -> None:
    page = parse(render_html(report))
    assert page.addresses == ["data:image/jpeg;base64,AAAA"]
    assert "http" not in render_html(report)
    for heading in ("Results", "AP over latency", "Per class", "KITTI AP", "Examples",
                    "Environment", "How to repeat"):  # fmt: skip
        assert heading in page.text
    assert "not certified" in page.text
    assert "Tram" not in page.text  # no ground truth: left out
    assert "fewer than 41 boxes" in page.text


def test_html_escapes_what_it_is_given(report: Report) -> None:
    evil = '<script>alert("1")</script>&'
    report.rows[0].name = report.reference = evil
    report.data = evil
    report.commands = [evil]
    report.examples[0].title = evil
    page = render_html(report)
    assert "<script" not in page
    assert evil in parse(page).text


def test_best_value_is_marked_only_where_one_row_has_it(report: Report) -> None:
    marked = re.findall(r'class="best">\s*([\d.]+)', render_html(report))
    assert marked[:2] == ["50.0", "75.0"]  # AP and AP50 of the teacher; equal sizes and p50
    for row in report.rows:
        row.coco = report.rows[0].coco
    assert 'class="best"' not in render_html(report)


def test_long_class_lists_fold(report: Report) -> None:
    one = report.rows[0].coco.per_class["Car"]
    for row in report.rows:
        row.coco.per_class = {f"class {n}": one for n in range(21)}
    assert "<summary>21 classes</summary>" in render_html(report)


def test_writes_four_files_or_says_why_not(report: Report, tmp_path: Path) -> None:
    paths = write_report(report, tmp_path / "out")
    assert sorted(p.name for p in paths) == [f"report.{s}" for s in ("csv", "html", "json", "md")]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as caught:
        write_report(report, tmp_path / "file")
    assert caught.value.code == "output-unwritable"


def point(name: str, ms: float, ap: float) -> Point:
    return Point(name, ms, ms * 0.9, ms * 1.2, ap, "#123456", True)


def test_of_many_artifacts_those_that_count_are_told(report: Report) -> None:
    like = report.rows[-1]
    assert report.told_misses() == report.misses() == []
    rows = []
    for k in range(12):
        ms = 10.0 + k
        total = like.latency.end_to_end.model_copy(update={"p50_ms": ms, "p90_ms": 1.1 * ms})
        latency = like.latency.model_copy(update={"end_to_end": total})
        # Every second one is beaten by the one before it.
        coco = like.coco.model_copy(update={"ap": 0.2 + 0.01 * (k if k % 2 == 0 else k - 3)})
        update = {"name": f"m{k}", "model": f"m{k}", "latency": latency, "coco": coco}
        rows.append(like.model_copy(update=update))
    budget = PerformanceBudget(ms=13.0)
    many = report.model_copy(
        update={"rows": rows, "reference": "m0", "budget": budget, "grid": True}
    )
    assert [s.split(":")[0] for s in many.verdict()] == ["m10", "m8", "m6", "m4", "m2"]
    assert many.told_misses() == ["10 of 12; held by m0, m1"] and len(many.misses()) == 10
    page = render_html(many)
    plot = page[page.index('<svg class="plot"') :]
    labels = re.findall(r'class="label"[^>]*>([^<]*)<', plot[: plot.index("</svg>")])
    assert sorted(labels) == sorted(["m0", "m2", "m4", "m6", "m8", "m10"])
    for text in (page, render_markdown(many)):
        assert "10 of 12; held by m0, m1" in text
    assert "m7: 17.00 ms" in render_markdown(many)  # one depth, twelve models


def test_plot_places_points_by_value() -> None:
    svg = ap_over_latency([point("a", 10, 0.2), point("b", 40, 0.6)])
    assert "end-to-end latency, ms (median" in svg and "COCO AP – up" in svg
    named = ap_over_latency([point("a", 10, 0.2)], axes=("processor time", "recall"))
    assert "processor time, ms" in named and "recall – up" in named and "COCO" not in named
    circles = re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', svg)
    (ax, ay), (bx, by) = ((float(x), float(y)) for x, y in circles)
    assert ax < bx and ay > by
    assert "logarithmic" not in svg


def test_plot_turns_logarithmic_for_wide_ranges_and_survives_equals() -> None:
    assert "logarithmic" in ap_over_latency([point("a", 1, 0.2), point("b", 100, 0.6)])
    svg = ap_over_latency([point("a", 10, 0.0), point("b", 10, 0.0), point("c", 10, 1.0)])
    labels = re.findall(r'class="label" x="([\d.-]+)" y="([\d.-]+)"', svg)
    assert len(set(labels)) == 3
    assert "nan" not in svg


def test_axis_ticks_are_round_and_inside() -> None:
    assert Axis(0, 62, 0, 1).ticks() == [0, 10, 20, 30, 40, 50, 60]
    assert Axis(0.9, 120, 0, 1, log=True).ticks() == [1, 2, 5, 10, 20, 50, 100]
    assert nice_step(5, 6) == 1


def test_latency_of_an_unquiet_machine_is_said_to_be_so_first(report: Report) -> None:
    report.rows[0].environment.run = "clean"
    report.rows[1].environment.run = "disturbed"
    disturbed, unknown = report.caveats()
    assert "not at rest" in disturbed and disturbed.endswith(": baseline")
    assert "not certified" in unknown and unknown.endswith(": student")
    assert disturbed in render_html(report) and disturbed in render_markdown(report)
    assert "p99 is nearly the slowest" in render_html(report)
