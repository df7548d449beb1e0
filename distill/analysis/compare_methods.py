"""The same student, data, steps and seeds for every method and the baseline, in one table.

A cell that fails is noted and costs no other, and the same command again goes on where it stopped.
"""

from __future__ import annotations

import html
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel

from detr.errors import UserError
from detr.files import write_atomic
from distill.analysis.cells import Job, Runner
from distill.analysis.curves import ap_over_steps
from distill.recipe import Recipe

BASELINE = "baseline"
# The teacher's weights to start from and nothing else: what a method adds shows against this row.
INHERITED = "inherit"
METRICS = {
    "ap": "AP",
    "ap50": "AP50",
    "ap75": "AP75",
    "ap_small": "S",
    "ap_medium": "M",
    "ap_large": "L",
}
# In the table only where a run has masks.
MASK_METRICS = {"mask_ap": "mask AP", "mask_ap50": "mask AP50", "mask_ap75": "mask AP75"}


class Cell(BaseModel):
    """One run.

    Attributes:
        method: Name, or several joined by ``+``; ``baseline`` learns from labels alone, and
            ``inherit`` does too, from the teacher's weights.
        seed: Of the run.
        values: AP and its parts, 0 to 1.
        curve: Steps and AP of every validation.
        seconds: Per step, without validation.
        megabytes: Most memory the process held.
        error: Last line of what went wrong, or ``None``.
    """

    method: str
    seed: int
    values: dict[str, float] = {}
    curve: list[tuple[int, float]] = []
    seconds: float | None = None
    megabytes: float | None = None
    error: str | None = None


class MethodComparison(BaseModel):
    """All cells of a comparison, in the order of the table."""

    recipe: str
    data: str
    steps: int
    cells: list[Cell]

    def to_markdown(self) -> str:
        """The table, with mean and standard deviation over seeds in percent."""
        head = self._head()
        rows = [head, ["---"] * len(head), *self._rows()]
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        failed = [f"- {c.method}, seed {c.seed}: {c.error}" for c in self.cells if c.error]
        title = f"{self.recipe} on {self.data}, {self.steps} steps"
        return "\n".join([title, "", *lines, *([""] if failed else []), *failed]) + "\n"

    def to_svg(self) -> str | None:
        """AP over steps; ``None`` where no run was measured on its way (``validation.every``)."""
        curves = {
            method: [cell.curve for cell in self.cells if cell.method == method]
            for method in dict.fromkeys(cell.method for cell in self.cells)
        }
        measured = any(len(curve) > 1 for runs in curves.values() for curve in runs)
        return ap_over_steps(curves) if measured else None

    def to_html(self) -> str:
        """The same as a page without outside resources."""
        head = "".join(f"<th>{h}</th>" for h in self._head())
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(v)}</td>" for v in row) + "</tr>"
            for row in self._rows()
        )
        failed = "".join(
            f"<li>{html.escape(f'{c.method}, seed {c.seed}: {c.error}')}</li>"
            for c in self.cells
            if c.error
        )
        title = html.escape(f"{self.recipe} on {self.data}, {self.steps} steps")
        return (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
            "<style>body{font:15px sans-serif;margin:2em}td,th{padding:.3em .8em;"
            "text-align:right}td:first-child,th:first-child{text-align:left}"
            "tr:nth-child(even){background:#eee}</style>"
            f"<h1>{title}</h1><table><tr>{head}</tr>{body}</table><ul>{failed}</ul>"
            f"{self.to_svg() or ''}</html>\n"
        )

    def _metrics(self) -> dict[str, str]:
        """Columns: names in :attr:`Cell.values` and what they are called."""
        masks = any(name in cell.values for cell in self.cells for name in MASK_METRICS)
        return METRICS | (MASK_METRICS if masks else {})

    def _head(self) -> list[str]:
        return ["method", *self._metrics().values(), "s/step", "MB", "seeds"]

    def _rows(self) -> list[list[str]]:
        rows, metrics = [], self._metrics()
        for method in dict.fromkeys(cell.method for cell in self.cells):
            cells = [c for c in self.cells if c.method == method]
            done = [c for c in cells if c.error is None]
            values = [_mean_and_deviation([c.values.get(m) for c in done], 100) for m in metrics]
            rows.append(
                [
                    method,
                    *values,
                    _mean_and_deviation([c.seconds for c in done], 1, 3),
                    _mean_and_deviation([c.megabytes for c in done], 1, 0),
                    f"{len(done)}/{len(cells)}",
                ]
            )
        return rows


def _mean_and_deviation(values: Sequence[float | None], factor: float, digits: int = 1) -> str:
    """Mean, and standard deviation where there are several values; a dash without any."""
    known = [factor * v for v in values if v is not None and math.isfinite(v)]
    if not known:
        return "-"
    mean = f"{statistics.fmean(known):.{digits}f}"
    return mean if len(known) < 2 else f"{mean} ± {statistics.stdev(known):.{digits}f}"


def cell_recipe(recipe: Recipe, method: str, seed: int) -> Recipe:
    """The recipe of one cell.

    A method keeps the options the recipe gives it. A method whose teacher is the running average
    gets one (constant decay 0.9996) where the recipe has none. An average that is itself measured
    must not stop following the student, so OD-DETR's stop update is then off unless asked for.

    Raises:
        UserError: ``method-unknown`` and what else is wrong with a method's options, or
            ``recipe-value`` where it needs a teacher and the recipe has none.
    """
    from distill.methods import find_method, parse_methods

    name = f"{recipe.name}-{method}-{seed}"
    changes: dict[str, object] = {"name": name, "seed": seed}
    if method == BASELINE:
        return recipe.without_teacher().model_copy(update=changes)
    if method == INHERITED:
        return recipe.model_copy(update=changes | {"methods": (), "teacher_answers": None})
    given = {key: options for entry in recipe.methods for key, options in entry.items()}
    specs = [{part: dict(given.get(part, {}))} for part in method.split("+")]
    kinds = [kind for kind, _ in parse_methods(specs)]
    if any(kind.teacher == "ema" for kind in kinds):
        if recipe.ema is None:
            changes |= {"ema": 0.9996, "ema_rising": False, "ema_evaluated": False}
        elif recipe.ema_evaluated:
            for entry in specs:
                for part, options in entry.items():
                    if "stop_update" in find_method(part).Options.model_fields:
                        options.setdefault("stop_update", False)
    found = recipe.model_copy(update=changes | {"methods": tuple(specs)})
    if found.needs_teacher and found.teacher is None:
        raise UserError("recipe-value", f"methods: {method} needs a teacher; add --set teacher=RUN")
    if not found.needs_teacher:
        found = found.model_copy(update={"teacher_answers": None})
    return found


def compare_methods(
    recipe: Recipe, methods: Sequence[str], seeds: int, out: Path, run: Runner
) -> MethodComparison:
    """Runs every method and the baseline with every seed and writes the table after each cell.

    Where the recipe inherits the teacher's weights, a row that only inherits is added.

    Args:
        recipe: Student, data, steps and teacher.
        methods: Names, each possibly several joined by ``+``.
        seeds: Runs per method, with the recipe's seed and those after it.
        out: Gets ``cells/METHOD-seedN`` and ``compare.json``, ``.md``, ``.html`` and, where runs
            are measured on their way, ``.svg``.
        run: Trains the cells.

    Raises:
        UserError: What :func:`cell_recipe` raises, before anything runs, ``output-unwritable``, and
            what ``run`` raises.
    """
    plain = [BASELINE] if recipe.inherit is None else [BASELINE, INHERITED]
    order = [*plain, *(m for m in dict.fromkeys(methods) if m not in plain)]
    wanted = [(m, recipe.seed + s) for s in range(seeds) for m in order]
    recipes = {(m, seed): cell_recipe(recipe, m, seed) for m, seed in wanted}
    jobs = {}
    for (method, seed), own in recipes.items():
        folder = out / "cells" / f"{method}-seed{seed}"
        path = folder.with_suffix(".yaml")
        write_atomic(path, own.to_yaml())
        jobs[Job(path, folder, own.steps)] = (method, seed)
    cells: dict[tuple[str, int], Cell] = {}
    for job, error in run(list(jobs)):
        method, seed = jobs[job]
        cells[method, seed] = _read_cell(method, seed, job.folder, error)
        table = MethodComparison(
            recipe=recipe.name,
            data=recipe.data.train,
            steps=recipe.steps,
            cells=[c for m in order for (name, _), c in sorted(cells.items()) if name == m],
        )
        write_atomic(out / "compare.json", table.model_dump_json(indent=2) + "\n")
        write_atomic(out / "compare.md", table.to_markdown())
        write_atomic(out / "compare.html", table.to_html())
        if picture := table.to_svg():
            write_atomic(out / "compare.svg", picture)
    return table


def _read_cell(method: str, seed: int, folder: Path, error: str | None) -> Cell:
    """A finished cell's numbers, from its run directory."""
    cell = Cell(method=method, seed=seed, error=error)
    if error is not None:
        return cell
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        cell.values |= {m: row[m] for m in METRICS | MASK_METRICS if m in row}
        if "ap" in row:
            cell.curve.append((row["step"], row["ap"]))
        cell.megabytes = row.get("peak_mb", cell.megabytes)
    # The first line of a run holds the start-up of threads and caches.
    times = [row["ms"] for row in rows if "ms" in row]
    if times:
        cell.seconds = statistics.fmean(times[1:] or times) / 1e3
    return cell
