"""The report as one HTML page that needs no other file, no script and no network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from jinja2 import Environment as Templates
from jinja2 import FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from bench.machine.clocks import Drift
from bench.report.analysis import shown
from bench.report.grid import depth, grid
from bench.report.model import MANY, Report, ReportRow, percent
from detr.plot import Point, ap_over_latency

# Told apart with every common color vision, on light and on dark ground.
_COLORS = ("#3b82c4", "#d97a1e", "#2f9e7a", "#c2559d", "#8b6fd0", "#8a8f1f", "#5f7488", "#c4483d")


def render_html(report: Report) -> str:
    """Fills the template; every text from outside is escaped by it."""
    series = {row.name: f"{row.precision} {row.engine}" for row in report.rows}
    shades = palette(dict.fromkeys(series.values()))
    # In a sweep a color is an engine and a precision, or there would be too many of them.
    colors = palette(series) if not report.grid else {n: shades[s] for n, s in series.items()}
    return load_template(Path(__file__).with_name("report.html.j2")).render(
        report=report,
        reference=next(row for row in report.rows if row.name == report.reference),
        colors=colors,
        plot=Markup(ap_over_latency(_points(report, colors))),  # escapes its own labels
        table=grid(report.rows) if report.grid else None,
        bests=_bests(report.rows),
        classes=_class_rows(report),
        machines=_machines(report.rows),
        analysis=shown({r.name: r.analysis for r in report.rows if r.analysis}, colors),
        kitti_note=next((row.kitti.note() for row in report.rows if row.kitti), ""),
    )


def load_template(template: Path) -> Template:
    """A template with the filters they all use; it may extend one of this folder."""
    templates = Templates(
        loader=FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"percent": percent, "ms": _ms, "change": _change, "clock": _clock}
    return templates.get_template(template.name)


def palette(names: Iterable[str]) -> dict[str, str]:
    """A color for each name, in the order given."""
    return {name: _COLORS[i % len(_COLORS)] for i, name in enumerate(names)}


def _clock(drift: Drift | None, which: Literal["cpu", "gpu"]) -> str:
    """Lowest and highest reading of a clock."""
    if drift is None:
        return "not watched"
    span = drift.cpu_mhz if which == "cpu" else drift.gpu_mhz
    return span if span == "unreadable" else f"{span.low:.0f} – {span.high:.0f}"


def _points(report: Report, colors: dict[str, str]) -> list[Point]:
    """Of many artifacts, those that nobody beats have their names written out."""
    front = {row.name for row in report.pareto()}
    names = {row.name: row.name for row in report.rows}
    if report.grid:
        # A depth says enough, unless something else was varied as well.
        varied = any(len(rows) > 1 for rows in grid(report.rows).cells.values())
        names = {row.name: row.model if varied else depth(row) for row in report.rows}
    return [
        Point(
            name=names[row.name],
            ms=row.ms,
            low_ms=row.latency.end_to_end.min_ms,
            high_ms=row.latency.end_to_end.p90_ms,
            ap=row.coco.ap,
            color=colors[row.name],
            pareto=row.name in front,
            label="" if len(report.rows) > MANY and row.name not in front else None,
        )
        for row in report.rows
    ]


def _bests(rows: Sequence[ReportRow]) -> dict[str, str]:
    """Name of the one row with the best value of a column; empty where several share it."""
    columns = {
        "ap": [-row.coco.ap for row in rows],
        "ap50": [-row.coco.ap50 for row in rows],
        "ap75": [-row.coco.ap75 for row in rows],
        "p50": [row.ms for row in rows],
        "size": [row.size_mb for row in rows],
    }
    return {key: rows[k].name if (k := _lowest(v)) >= 0 else "" for key, v in columns.items()}


def _lowest(values: Sequence[float]) -> int:
    """Position of the lowest value, -1 where it is not the only one or nothing to compare with."""
    low = min(values)
    return values.index(low) if len(values) > 1 and values.count(low) == 1 else -1


def _class_rows(report: Report) -> list[dict[str, object]]:
    """Per class: name, boxes and the AP of every row, with the best one marked."""
    table: list[dict[str, object]] = []
    for name in report.class_names():
        found = [row.coco.per_class[name] for row in report.rows]
        best = _lowest([-(ap.ap or 0.0) for ap in found])
        table.append({"name": name, "count": found[0].count, "cells": found, "best": best})
    return table


def _machines(rows: Sequence[ReportRow]) -> list[tuple[list[str], ReportRow]]:
    """Rows measured on the same machine are described once."""
    groups: list[tuple[list[str], ReportRow]] = []
    for row in rows:
        for names, first in groups:
            a, b = first.environment.machine, row.environment.machine
            if a.model_copy(update={"packages": {}}) == b.model_copy(update={"packages": {}}):
                names.append(row.name)
                break
        else:
            groups.append(([row.name], row))
    return groups


def _ms(value: float) -> str:
    """Three significant digits for short times, whole milliseconds for long ones."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _change(value: float, base: float) -> str:
    """A difference in AP points, with its sign."""
    return f"{100 * (value - base):+.1f}".replace("-", "−")
