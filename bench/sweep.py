"""``bench sweep``: depths by precision by engine, one report with one table of them.

Depth and precision come with the bundles, so a sweep is a list of bundles times a list of engines.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from bench.opened import model_names, open_artifact, same_classes
from bench.report.model import Report, ReportRow
from bench.run import benchmark_artifacts, reference_name
from detr.config import ClassMap
from detr.errors import UserError
from detr.metrics.coco_ap import Accuracy
from detr.metrics.outcomes import GroundTruth, Outcomes, pack, unpack
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
    """Measures every bundle in every engine, one after the other so that one is in memory.

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
    rows: list[ReportRow] = []
    skipped: list[str] = []
    outcomes: dict[str, Outcomes] = {}
    truth: GroundTruth | None = None
    classes: ClassMap | None = None
    for name, path in zip(model_names(models), models, strict=True):
        for engine in dict.fromkeys(engines):
            label = f"{name} {engine}"
            try:
                artifact = open_artifact(label, path, engine, threads)
            except UserError as error:
                skipped.append(f"{label}: {error.message}")
                continue
            classes = classes or artifact.engine.info.classes
            same_classes(models[0], classes, artifact)
            report = benchmark_artifacts([artifact], data, limit, iterations, accuracy=accuracy)
            rows += report.rows
            assert report.matches is not None
            truth, found = unpack(io.BytesIO(report.matches))
            outcomes |= found
    if truth is None:
        raise UserError("sweep-empty", "nothing to measure: " + "; ".join(skipped))
    return Report(
        title="Sweep over depth, precision and engine",
        data=data,
        created=report.created,
        reference=reference_name(rows),
        rows=rows,
        grid=True,
        skipped=skipped,
        commands=list(commands),
        truth_sha256=truth.fingerprint,
        matches=pack(truth, outcomes),
    )
