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


def candidates(paths: Sequence[Path]) -> list[Path]:
    """The bundles named, and those in folders named, by name.

    Raises:
        UserError: ``fit-empty`` for a folder that holds no bundle.
    """
    found: list[Path] = []
    for path in paths:
        if is_bundle(path) or not path.is_dir():
            found.append(path)
            continue
        inside = sorted(child for child in path.iterdir() if is_bundle(child))
        if not inside:
            raise UserError("fit-empty", f"{path}: neither a bundle nor a folder of bundles")
        found += inside
    return found


def choose(
    report: Report, ms: float, again: Callable[[ReportRow], float]
) -> tuple[ReportRow | None, float | None, dict[str, float]]:
    """The most accurate row that holds the budget, and holds it again.

    A latency measured once is a matter of luck at the edge of a budget, and choosing among many
    picks the lucky ones: so what is chosen is timed a second time, and if it misses, the next.

    Args:
        report: Of all candidates.
        ms: The budget, see :class:`PerformanceBudget`.
        again: Times a row a second time; its 90th percentile.

    Returns:
        The row, its second time, and the rows that missed the second time with theirs.
    """
    budget = PerformanceBudget(ms=ms)
    within = [row for row in report.rows if not budget.misses(row)]
    late: dict[str, float] = {}
    for row in sorted(within, key=lambda row: (-row.coco.ap, row.latency.end_to_end.p90_ms)):
        if (second := again(row)) <= ms:
            return row, second, late
        late[row.model] = second
    return None, None, late


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

    One is in memory at a time: there may be dozens, on a device with little memory.

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

    def again(row: ReportRow) -> float:
        timed = benchmark_timing([Path(row.artifact)], data, engine, threads, limit, iterations)
        return timed.rows[0].latency.end_to_end.p90_ms

    kept, second, late = choose(report, ms, again)
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
        kept_again_ms=second,
        late=late,
        candidates=found,
        skipped=report.skipped,
        commands=list(commands),
    )
    return chosen, report
