"""``bench run``: average precision and latency of the same artifacts, one report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import click

from bench.analysis.analyze import analyze, properties
from bench.artifact import identity, stored_parameters, worst_status
from bench.latency import Latency
from bench.machine.environment import Environment
from bench.opened import Artifact, model_names, open_artifact, same_classes
from bench.pictures import example, mistake_pictures
from bench.report.model import PerformanceBudget, Report, ReportRow
from bench.turns import TIMED_IMAGES, speed_beside, time_in_turns
from detr.cli_support import progress
from detr.data import Dataset, inspect, open_dataset
from detr.data.coco_document import coco_ground_truth
from detr.data.dataset import evenly_spaced
from detr.data.kitti_rows import KittiObject
from detr.errors import UserError
from detr.metrics import coco_ap, kitti_ap
from detr.metrics.coco_ap import Accuracy, CocoAp
from detr.metrics.outcomes import GroundTruth, match_detections, pack
from detr.types import ImageArray

_EXAMPLES = 4


def benchmark(
    models: Sequence[Path],
    data: str,
    engine: str | None = None,
    limit: int | None = None,
    iterations: int = 50,
    commands: Sequence[str] = (),
    budget: PerformanceBudget | None = None,
    *,
    threads: int | None = None,
    accuracy: Accuracy | None = None,
    slices: Path | None = None,
) -> Report:
    """Opens models and measures them on a data set; see :func:`benchmark_artifacts`.

    Args:
        models: Bundles, checkpoints or run directories.
        data: Data set specification.
        engine: Runtime, see :func:`engines.open_engine`.
        limit: Use this many images, spread evenly over the data set.
        iterations: Timed calls per model.
        commands: How to repeat the report.
        budget: What every row is held against; see :meth:`bench.report.model.Report.misses`.
        threads: Of every engine.
        accuracy: How AP is computed.
        slices: CSV file with what objects or images are to be sliced by; see
            :func:`bench.analysis.properties.table_properties`.

    Raises:
        UserError: What opening a model or reading the data raises; ``bench-classes`` where the
            models differ in their classes; ``data-empty`` without images.
    """
    artifacts = [
        open_artifact(name, path, engine, threads)
        for name, path in zip(model_names(models), models, strict=True)
    ]
    return benchmark_artifacts(
        artifacts, data, limit, iterations, commands, budget, accuracy=accuracy, slices=slices
    )


def benchmark_artifacts(
    artifacts: Sequence[Artifact],
    data: str,
    limit: int | None = None,
    iterations: int = 50,
    commands: Sequence[str] = (),
    budget: PerformanceBudget | None = None,
    *,
    accuracy: Accuracy | None = None,
    slices: Path | None = None,
) -> Report:
    """Measures opened models on a data set.

    Every image is decoded once and goes through all models; then the models are timed in turns.

    Args:
        artifacts: What to measure.
        data: Data set specification.
        limit: Use this many images, spread evenly over the data set.
        iterations: Timed calls per model.
        commands: How to repeat the report.
        budget: What every row is held against.
        accuracy: How AP is computed.
        slices: CSV file with what objects or images are to be sliced by; see
            :func:`bench.analysis.properties.table_properties`.

    Raises:
        UserError: ``bench-classes``, ``data-empty``, ``slices-file``, and what reading the data
            raises.
    """
    accuracy = accuracy or Accuracy()
    classes = artifacts[0].engine.info.classes
    for artifact in artifacts[1:]:
        same_classes(artifacts[0].path, classes, artifact)
    ranges = {artifact.engine.info.preprocess.range for artifact in artifacts}
    if len(ranges) > 1:
        raise UserError(
            "bench-range", "the models read images of different value ranges; measure them apart"
        )
    dataset = open_dataset(data, classes, ranges.pop())
    indices = evenly_spaced(len(dataset), limit)
    if not indices:
        raise UserError("data-empty", f"{data}: no images to measure on")
    findings = inspect(dataset, indices)
    findings.stop()
    if findings.warnings:
        click.echo(findings.summary(), err=True)
    for artifact in artifacts:
        most = artifact.most
        if findings.most_objects > most:
            click.echo(
                f"{artifact.name}: finds at most {most} objects in an image, and one holds "
                f"{findings.most_objects}",
                err=True,
            )
    slicings = properties(dataset, indices, slices)
    shown = set(_example_indices(dataset, indices))
    timed = set(indices[i] for i in evenly_spaced(len(indices), TIMED_IMAGES))
    images = _detect(artifacts, dataset, indices, keep=shown | timed)

    aps = [coco_ap.evaluate(dataset, a.detections, indices, accuracy) for a in artifacts]
    mask_aps = [_mask_ap(artifact, dataset, indices, accuracy) for artifact in artifacts]
    if note := aps[0].note():
        click.echo(f"{data}: {note}", err=True)
    timings = time_in_turns(artifacts, [images[i] for i in sorted(timed)], iterations)
    rows = [
        _row(artifact, dataset, indices, ap, mask_ap, latency, environment)
        for artifact, ap, mask_ap, latency, environment in zip(
            artifacts, aps, mask_aps, *timings, strict=True
        )
    ]
    reference = reference_name(rows)
    base = next(row for row in rows if row.name == reference)
    truth = coco_ap.restrict(coco_ground_truth(dataset), [dataset.image_id(i) for i in indices])
    outcomes, mistakes = {}, []
    for row, artifact in zip(rows, artifacts, strict=True):
        row.speed = None if row is base else speed_beside(base.latency, row.latency)
        found = match_detections(truth, artifact.detections, accuracy.max_dets)
        outcomes[row.name] = found
        row.analysis, wrong = analyze(truth, artifact.detections, found, slicings)
        mistakes.append(mistake_pictures(row.name, wrong, dataset, indices, truth))
    positives = GroundTruth.of(truth)
    return Report(
        data=data,
        created=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        reference=reference,
        rows=rows,
        commands=list(commands),
        budget=budget,
        truth_sha256=positives.fingerprint,
        examples=[
            example(
                [(a.name, a.detections[indices.index(i)]) for a in artifacts], dataset, i, images[i]
            )
            for i in sorted(shown)
        ],
        mistakes=[one for one in mistakes if one is not None],
        matches=pack(positives, outcomes),
    )


def reference_name(rows: Sequence[ReportRow]) -> str:
    """Whom the others are compared with: the teacher if one is called so, else the best by AP."""
    teachers = [row.name for row in rows if "teacher" in row.name.lower()]
    return teachers[0] if teachers else max(rows, key=lambda row: row.coco.ap).name


def _detect(
    artifacts: Sequence[Artifact], dataset: Dataset, indices: Sequence[int], keep: set[int]
) -> dict[int, ImageArray]:
    """Runs every model over every image; returns the images to keep."""
    kept = {}
    for i in progress(indices, "detecting"):
        image = dataset.image(i)
        for artifact in artifacts:
            artifact.detections += artifact.engine([image])
        if i in keep:
            kept[i] = image
    return kept


def _row(
    artifact: Artifact,
    dataset: Dataset,
    indices: Sequence[int],
    ap: CocoAp,
    masks: CocoAp | None,
    latency: Latency,
    environment: Environment,
) -> ReportRow:
    engine = artifact.engine
    return ReportRow(
        name=artifact.name,
        engine=engine.name,
        precision=artifact.precision,
        parity=worst_status(engine.artifacts, engine.name),
        encoder_layers=engine.info.depth[0],
        decoder_layers=engine.info.depth[1],
        parameters=stored_parameters(engine.artifact),
        size_mb=sum(file.stat().st_size for file in engine.artifacts) / 1e6,
        artifact=str(artifact.path),
        sha256=identity(engine.artifacts),
        checkpoint_sha256=artifact.checkpoint_sha256,
        coco=ap,
        kitti=_kitti(artifact, dataset, indices),
        masks=masks,
        latency=latency,
        threads=artifact.threads,
        environment=environment,
    )


def _mask_ap(
    artifact: Artifact, dataset: Dataset, indices: Sequence[int], accuracy: Accuracy
) -> CocoAp | None:
    """AP of masks where the artifact finds some; if the labels have none, that is said."""
    if all(found.masks is None for found in artifact.detections):
        return None
    try:
        return coco_ap.evaluate(
            dataset, artifact.detections, indices, replace(accuracy, overlap="segm")
        )
    except UserError as error:
        if not error.code.startswith("mask-"):
            raise
        click.echo(f"{artifact.name}: masks are not scored: {error.message}", err=True)
        return None


def _kitti(artifact: Artifact, dataset: Dataset, indices: Sequence[int]) -> kitti_ap.KittiAp | None:
    """KITTI AP where data and classes have what it needs."""
    labels = dataset.protocols.kitti
    if labels is None:
        return None
    official = kitti_ap.evaluable(labels)
    if not official:
        return None
    names = dataset.classes.names
    found = [
        [
            KittiObject(names[label], -1, -1, -10, (x0, y0, x1, y1), score)
            for (x0, y0, x1, y1), score, label in zip(
                d.boxes.tolist(), d.scores.tolist(), d.labels.tolist(), strict=True
            )
        ]
        for d in artifact.detections
    ]
    return kitti_ap.evaluate([labels.objects(i) for i in indices], found, official)


def _example_indices(dataset: Dataset, indices: Sequence[int]) -> list[int]:
    """A few of the images that have boxes, spread evenly: chosen before anything is detected."""
    labeled = [i for i in indices if len(dataset.labels(i).labels)]
    return [labeled[k] for k in evenly_spaced(len(labeled), _EXAMPLES)]
