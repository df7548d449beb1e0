"""``bench sweep``: depths by precision by engine, one report with one table of them.

Depth and precision come with the bundles, so a sweep is a list of bundles times a list of engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.opened import Artifact, model_names, open_artifact
from bench.report.model import Report
from bench.run import benchmark_artifacts
from detr.errors import UserError
from detr.metrics.coco_ap import Accuracy
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
) -> Report:
    """Measures every bundle in every engine; all are in memory together and timed in turns.

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

    Raises:
        UserError: ``engine-unknown``, ``sweep-empty`` where nothing could be opened,
            ``bench-classes``, and what measuring raises.
    """
    for engine in engines:
        check_name(engine)
    artifacts: list[Artifact] = []
    skipped: list[str] = []
    for name, path in zip(model_names(models), models, strict=True):
        for engine in dict.fromkeys(engines):
            label = f"{name} {engine}"
            try:
                artifacts.append(open_artifact(label, path, engine, threads))
            except UserError as error:
                skipped.append(f"{label}: {error.message}")
    if not artifacts:
        raise UserError("sweep-empty", "nothing to measure: " + "; ".join(skipped))
    report = benchmark_artifacts(artifacts, data, limit, iterations, commands, accuracy=accuracy)
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
