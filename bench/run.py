"""``bench run``: average precision and latency of the same artifacts, one report."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import click
import numpy as np
from PIL import Image

from bench.artifact import identity, provenance, stored_parameters, worst_status
from bench.latency import measure_latency
from bench.machine.clocks import Watch, read_clocks
from bench.machine.environment import assess_environment, read_machine
from bench.report.model import Example, PerformanceBudget, Picture, Report, ReportRow
from detr.cli_support import progress
from detr.config import ClassMap
from detr.data import Dataset, inspect, open_dataset
from detr.data.coco_document import coco_ground_truth
from detr.data.dataset import evenly_spaced
from detr.data.draw import draw
from detr.data.kitti_rows import KittiObject
from detr.data.value_range import to_bytes
from detr.errors import UserError
from detr.metrics import coco_ap, kitti_ap
from detr.metrics.outcomes import GroundTruth, match_detections, pack
from detr.types import Detections, ImageArray
from engines.base import Engine
from engines.open import open_engine

# Kept decoded for the timing: enough to defeat a cache of one image, little enough for memory.
_TIMED_IMAGES = 32
_EXAMPLES = 4
_EXAMPLE_WIDTH = 640


@dataclass
class Artifact:
    """One model being measured, and what it found."""

    name: str
    path: Path
    engine: Engine
    precision: str
    checkpoint_sha256: str
    detections: list[Detections]


def benchmark(
    models: Sequence[Path],
    data: str,
    engine: str | None = None,
    limit: int | None = None,
    iterations: int = 50,
    commands: Sequence[str] = (),
    budget: PerformanceBudget | None = None,
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

    Raises:
        UserError: What opening a model or reading the data raises; ``bench-classes`` where the
            models differ in their classes; ``data-empty`` without images.
    """
    artifacts = [
        open_artifact(name, path, engine)
        for name, path in zip(model_names(models), models, strict=True)
    ]
    return benchmark_artifacts(artifacts, data, limit, iterations, commands, budget)


def open_artifact(name: str, path: Path, engine: str | None) -> Artifact:
    """Loads a model into a runtime, nothing found yet.

    Raises:
        UserError: What :func:`engines.open.open_engine` raises.
    """
    opened = open_engine(path, engine)
    return Artifact(name, path, opened, *provenance(path, opened.artifact), [])


def benchmark_artifacts(
    artifacts: Sequence[Artifact],
    data: str,
    limit: int | None = None,
    iterations: int = 50,
    commands: Sequence[str] = (),
    budget: PerformanceBudget | None = None,
) -> Report:
    """Measures opened models on a data set.

    Every image is decoded once and goes through all models; then each model is timed alone.

    Args:
        artifacts: What to measure.
        data: Data set specification.
        limit: Use this many images, spread evenly over the data set.
        iterations: Timed calls per model.
        commands: How to repeat the report.
        budget: What every row is held against.

    Raises:
        UserError: ``bench-classes``, ``data-empty``, and what reading the data raises.
    """
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
    shown = set(_example_indices(dataset, indices))
    timed = set(indices[i] for i in evenly_spaced(len(indices), _TIMED_IMAGES))
    images = _detect(artifacts, dataset, indices, keep=shown | timed)

    rows = []
    for artifact in artifacts:
        rows.append(
            _row(artifact, dataset, indices, [images[i] for i in sorted(timed)], iterations)
        )
    truth = coco_ap.restrict(coco_ground_truth(dataset), [dataset.image_id(i) for i in indices])
    positives = GroundTruth.of(truth)
    examples = [_example(artifacts, dataset, i, indices.index(i), images[i]) for i in sorted(shown)]
    return Report(
        data=data,
        created=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        reference=reference_name(rows),
        rows=rows,
        commands=list(commands),
        budget=budget,
        truth_sha256=positives.fingerprint,
        examples=examples,
        matches=pack(positives, {a.name: match_detections(truth, a.detections) for a in artifacts}),
    )


def model_names(models: Sequence[Path]) -> list[str]:
    """A short name for each model, as much of its path as tells it from the others.

    Raises:
        UserError: ``bench-twice``.
    """
    paths = [model.resolve() for model in models]
    # A run directory's weights are called model.safetensors: its name says nothing.
    paths = [path.parent if path.stem == "model" else path for path in paths]
    for path in paths:
        if paths.count(path) > 1:
            raise UserError("bench-twice", f"{path}: the same model is given twice")
    stems = [path.stem for path in paths]
    if len(set(stems)) == len(stems):
        return stems
    depth = 1
    while True:
        names = ["/".join(path.parts[1:][-depth:]) for path in paths]
        if len(set(names)) == len(names) or depth >= max(len(path.parts) for path in paths):
            return names
        depth += 1


def reference_name(rows: Sequence[ReportRow]) -> str:
    """Whom the others are compared with: the teacher if one is called so, else the best by AP."""
    teachers = [row.name for row in rows if "teacher" in row.name.lower()]
    return teachers[0] if teachers else max(rows, key=lambda row: row.coco.ap).name


def same_classes(path: Path, classes: ClassMap, other: Artifact) -> None:
    """Refuses a model whose classes are not those of the model at ``path``.

    Raises:
        UserError: ``bench-classes``.
    """
    if other.engine.info.classes != classes:
        raise UserError(
            "bench-classes",
            f"{other.path} has the classes {', '.join(other.engine.info.classes.names)}, but "
            f"{path} has {', '.join(classes.names)}: a report compares models of the same classes",
        )


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
    images: Sequence[ImageArray],
    iterations: int,
) -> ReportRow:
    engine = artifact.engine
    watch = Watch()
    before = read_clocks()
    timing = measure_latency(engine, images, iterations=iterations, between=watch)
    after = read_clocks()
    return ReportRow(
        name=artifact.name,
        engine=engine.name,
        precision=artifact.precision,
        parity=worst_status(engine.artifacts, engine.name),
        encoder_layers=engine.info.detector.encoder.layers,
        decoder_layers=engine.info.detector.decoder.layers,
        parameters=stored_parameters(engine.artifact),
        size_mb=sum(file.stat().st_size for file in engine.artifacts) / 1e6,
        artifact=str(artifact.path),
        sha256=identity(engine.artifacts),
        checkpoint_sha256=artifact.checkpoint_sha256,
        coco=coco_ap.evaluate(dataset, artifact.detections, indices),
        kitti=_kitti(artifact, dataset, indices),
        latency=timing,
        environment=assess_environment(
            read_machine(engine.versions), before, after, watch.drift(), engine.on_gpu
        ),
    )


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


def _example(
    artifacts: Sequence[Artifact], dataset: Dataset, i: int, position: int, image: ImageArray
) -> Example:
    names = dataset.classes.names
    # Small pictures are enlarged, or the names on the boxes would cover them.
    scale = _EXAMPLE_WIDTH / image.shape[1]
    size = (_EXAMPLE_WIDTH, max(1, round(image.shape[0] * scale)))
    small = np.asarray(
        Image.fromarray(to_bytes(image, None)).resize(size, Image.Resampling.LANCZOS)
    )
    truth = dataset.labels(i)
    boxes = np.concatenate([truth.boxes, truth.ignore]) * scale
    labels = np.concatenate([truth.labels, np.full(len(truth.ignore), -1)])
    pictures = [
        Picture(
            title="ground truth",
            boxes=len(truth.labels),
            uri=_jpeg(draw(small, boxes, labels, names)),
        )
    ]
    for artifact in artifacts:
        found = artifact.detections[position].above(Report.model_fields["score_threshold"].default)
        drawn = draw(small, found.boxes * scale, found.labels, names, found.scores)
        pictures.append(Picture(title=artifact.name, boxes=len(found), uri=_jpeg(drawn)))
    return Example(title=dataset.image_path(i).name, pictures=pictures)


def _jpeg(image: ImageArray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
