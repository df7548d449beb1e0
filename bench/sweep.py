"""``bench sweep``: depths by precision by engine, one report with one table of them.

Depth and precision come with the bundles, so a sweep is a list of bundles times a list of engines.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from bench.opened import Artifact, model_names, open_artifact
from bench.report.model import Report
from bench.run import benchmark_artifacts, reference_name
from detr.errors import UserError
from detr.metrics.coco_ap import Accuracy
from detr.metrics.outcomes import pack, unpack
from engines.open import check_name


def sweep(
    models: Sequence[Path],
    engines: Sequence[str],
    data: str,
    limit: int | None = None,
    iterations: int = 50,
    commands: Sequence[str] = (),
    *,
    threads: int | None = None,
    accuracy: Accuracy | None = None,
    together: bool = True,
) -> Report:
    """Measures every bundle in every engine.

    Args:
        models: Bundles, each of one depth and precision.
        engines: Names as ``open_engine`` takes them. An engine that is not installed, or does not
            take a bundle, leaves its place empty and a line in ``Report.skipped``.
        data: Data set specification.
        limit: Use this many images, spread evenly over the data set.
        iterations: Timed calls each.
        commands: How to repeat the report.
        threads: Of every engine that takes a number.
        accuracy: How AP is computed.
        together: All in memory at once and timed in turns, which compares them best; otherwise one
            after the other, which takes the memory of one.

    Raises:
        UserError: ``engine-unknown``, ``sweep-empty`` where nothing could be opened,
            ``bench-classes``, and what measuring raises.
    """
    for engine in engines:
        check_name(engine)
    skipped: list[str] = []
    wanted = [
        (f"{name} {engine}", path, engine)
        for name, path in zip(model_names(models), models, strict=True)
        for engine in dict.fromkeys(engines)
    ]

    def measure(group: Sequence[tuple[str, Path, str]]) -> Report | None:
        # What is opened here is let go before the next group is.
        artifacts = [one for place in group for one in _opened(*place, threads, skipped)]
        if not artifacts:
            return None
        return benchmark_artifacts(artifacts, data, limit, iterations, commands, accuracy=accuracy)

    groups = [wanted] if together else [[one] for one in wanted]
    reports = [report for group in groups if (report := measure(group)) is not None]
    if not reports:
        raise UserError("sweep-empty", "nothing to measure: " + "; ".join(skipped))
    report = _joined(reports)
    # Pictures of a dozen rows beside each other show nobody anything.
    return report.model_copy(
        update={
            "title": "Sweep over depth, precision and engine",
            "grid": True,
            "skipped": skipped,
            "examples": [],
            "mistakes": [],
        }
    )


def _opened(
    label: str, path: Path, engine: str, threads: int | None, skipped: list[str]
) -> list[Artifact]:
    """The artifact; or none, and a line in ``skipped``, where it cannot be opened."""
    try:
        return [open_artifact(label, path, engine, threads)]
    except UserError as error:
        skipped.append(f"{label}: {error.message}")
        return []


def _joined(reports: Sequence[Report]) -> Report:
    """One report of several on the same images. Speeds beside each other are of one report only."""
    first, *rest = reports
    if not rest:
        return first
    rows = [row for report in reports for row in report.rows]
    measured = [unpack(io.BytesIO(report.matches)) for report in reports if report.matches]
    outcomes = {name: one for _, found in measured for name, one in found.items()}
    return first.model_copy(
        update={
            "rows": rows,
            "reference": reference_name(rows),
            "matches": pack(measured[0][0], outcomes) if measured else None,
        }
    )
