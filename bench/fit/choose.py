"""Measuring candidates and choosing among them.

All are measured: a candidate left out by a guess of its AP or its latency could be the best one,
and what a bundle costs to measure is little beside what it costs to train and export.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from bench.fit.model import Candidate, Fit
from bench.report.model import PerformanceBudget, Report, ReportRow
from bench.sweep import sweep
from bench.timing import benchmark_timing
from detr.errors import UserError
from engines.bundle import is_bundle

# Timed in turns: what else the device does then falls on all of them alike.
FINALISTS = 4
# How far over the budget a first latency may lie that a second one could bring within it.
NEAR = 1.1


def candidates(paths: Sequence[Path]) -> list[Path]:
    """The bundles named, and those in folders named, by name.

    Raises:
        UserError: ``model-missing`` for a path that is not there, ``fit-empty`` for a folder that
            holds no bundle.
    """
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UserError("model-missing", f"{path}: no such bundle or folder of bundles")
        if is_bundle(path) or not path.is_dir():
            found.append(path)
            continue
        inside = sorted(child for child in path.iterdir() if is_bundle(child))
        if not inside:
            raise UserError("fit-empty", f"{path}: neither a bundle nor a folder of bundles")
        found += inside
    return found


def _worth(row: ReportRow) -> tuple[float, float]:
    """By AP, the faster of equals first."""
    return -row.coco.ap, row.latency.end_to_end.p90_ms


def choose(
    rows: Sequence[ReportRow], ms: float, again: Callable[[Sequence[ReportRow]], list[ReportRow]]
) -> tuple[ReportRow | None, dict[str, ReportRow]]:
    """The most accurate row that holds the budget when it is timed beside its neighbours.

    A latency measured once and alone is a matter of luck at the edge of a budget, and choosing
    among many picks the lucky ones. So those within the budget or near it are timed a second time,
    a few in turns, the most accurate first, until one of them holds it.

    Args:
        rows: All candidates, timed one after the other.
        ms: The budget, see :class:`PerformanceBudget`.
        again: Times rows in turns and returns them with what it found.

    Returns:
        The row, and by name all that were timed again, as they are now.
    """
    budget, near = PerformanceBudget(ms=ms), PerformanceBudget(ms=NEAR * ms)
    order = sorted((row for row in rows if not near.misses(row)), key=_worth)
    second: dict[str, ReportRow] = {}
    for start in range(0, len(order), FINALISTS):
        group = again(order[start : start + FINALISTS])
        second |= {row.name: row for row in group}
        within = [row for row in group if not budget.misses(row)]
        if within:
            return min(within, key=_worth), second
    return None, second


def fit(
    models: Sequence[Path],
    engine: str,
    data: str,
    ms: float,
    limit: int | None = None,
    iterations: int = 50,
    commands: Sequence[str] = (),
    *,
    threads: int | None = None,
) -> tuple[Fit, Report]:
    """Measures bundles one after the other and chooses the best within a budget.

    One is in memory at a time: there may be dozens, on a device with little memory. Only those that
    the choice is between are timed again in turns, :data:`FINALISTS` at most in memory.

    Args:
        models: Bundles.
        engine: Runtime.
        data: Data set specification.
        ms: Most milliseconds end to end for nine images of ten.
        limit: Use this many images, spread evenly.
        iterations: Timed calls of each.
        commands: How to repeat it.
        threads: Of the engine.

    Raises:
        UserError: What :func:`bench.sweep.sweep` raises.
    """
    report = sweep(
        models, [engine], data, limit, iterations, commands, threads=threads, together=False
    )
    report.title, report.budget = f"Nothing for {ms:g} ms", PerformanceBudget(ms=ms)

    def again(rows: Sequence[ReportRow]) -> list[ReportRow]:
        paths = [Path(row.artifact) for row in rows]
        timed = benchmark_timing(paths, data, engine, threads, limit, iterations).rows
        return [
            row.model_copy(update={"latency": one.latency, "environment": one.environment})
            for row, one in zip(rows, timed, strict=True)
        ]

    kept, second = choose(report.rows, ms, again)
    report.rows = [second.get(row.name, row) for row in report.rows]
    if kept is not None:
        report.title = f"{kept.model}: the best of {len(report.rows)} for {ms:g} ms"
    front = {row.name for row in report.pareto()}
    found = [
        Candidate(
            name=row.model,
            artifact=row.artifact,
            encoder_layers=row.encoder_layers,
            decoder_layers=row.decoder_layers,
            ap=row.coco.ap,
            min_ms=row.latency.end_to_end.min_ms,
            ms=row.ms,
            p90_ms=row.latency.end_to_end.p90_ms,
            again=row.name in second,
            within=not report.budget.misses(row),
            pareto=row.name in front,
        )
        for row in sorted(report.rows, key=lambda row: (row.ms, row.name))
    ]
    chosen = Fit(
        data=data,
        engine=engine,
        created=report.created,
        budget_ms=ms,
        kept=None if kept is None else kept.model,
        candidates=found,
        skipped=report.skipped,
        commands=list(commands),
    )
    return chosen, report
