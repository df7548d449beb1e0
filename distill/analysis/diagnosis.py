"""Why a run is as good as it is: how steady its matching is and how many queries see each object.

The measures of four papers on one slice of a data set: queries that change their object between
validations (DN-DETR's IS), objects that change their query between decoder layers (Stable-DINO's
unstable score), objects matched alike by student and teacher (OD-DETR, figure 5) and queries per
object by generalized IoU (QSKD, table 1).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from detr.data import Dataset, open_dataset
from detr.data.dataset import evenly_spaced
from detr.data.preprocess import PreprocessConfig
from detr.errors import UserError
from detr.files import write_atomic
from detr.model_info import ModelInfo
from detr.models import Detector, cxcywh_to_xyxy, load_model
from detr.models.class_names import listed
from detr.shipped import find_model
from distill.losses.overlap import pairwise_giou
from distill.query_owners import (
    OWNERS_FILE,
    Answer,
    Owners,
    answers,
    consistency,
    instability,
    layer_owners,
    read_owner_records,
)
from distill.recipe import load_recipe
from distill.teachers.chosen_classes import ChosenClasses, columns_of

# Generalised IoU above which QSKD's table 1 counts a query; the last counts all.
THRESHOLDS = (0.75, 0.5, 0.3, 0.1, 0.0, -1.0)

Curve = list[tuple[int, float]]


class ModelDiagnosis(BaseModel):
    """One model's matching on the slice.

    Attributes:
        name: ``student``, ``baseline`` or ``teacher``.
        path: Where it came from.
        unstable: By layer ("encoder to 1", "1 to 2", ...), percent of objects whose query is
            another one than in the layer before.
        queries_per_object: By least generalized IoU, mean number of queries whose best object it
            is.
        consistency: Percent of objects whose query has the same number in the teacher's last
            layer; ``None`` without a teacher of as many queries.
    """

    name: str
    path: str
    unstable: dict[str, float]
    queries_per_object: dict[str, float]
    consistency: float | None = None


class Diagnosis(BaseModel):
    """A run's diagnosis.

    Attributes:
        run: Its folder.
        data: Data set the models were looked at on.
        images: Number of them.
        objects: Objects in them.
        models: The student first.
        instability: By model (``student``, ``average``, ``baseline``): finished steps of a
            validation, and queries per image that changed their object since the one before.
        average_consistency: Finished steps, and percent of objects for which student and weight
            average agree.
        ap: By model, finished steps and AP in percent.
        loss: The same of the training loss.
    """

    run: str
    data: str
    images: int
    objects: int
    models: list[ModelDiagnosis]
    instability: dict[str, Curve]
    average_consistency: Curve
    ap: dict[str, Curve]
    loss: dict[str, Curve]

    def text(self) -> str:
        """What a terminal shows."""
        lines = [f"{self.run} on {self.images} images of {self.data}, {self.objects} objects"]
        for model in self.models:
            lines += [
                "",
                f"{model.name}: {model.path}",
                "  objects that change their query between layers, percent: "
                + _listed(model.unstable, 1),
                "  queries per object by least GIoU: " + _listed(model.queries_per_object, 1),
            ]
            if model.consistency is not None:
                lines.append(f"  matched like the teacher: {model.consistency:.1f} %")
        for name, curve in self.instability.items():
            told = ", ".join(f"{value:.2f} by step {step}" for step, value in curve)
            if told:
                lines += ["", f"{name}: queries per image that changed their object: {told}"]
        return "\n".join(lines)


def _listed(values: dict[str, float], digits: int) -> str:
    return ", ".join(f"{key} {value:.{digits}f}" for key, value in values.items())


@dataclass
class Subject:
    """A model under diagnosis and what it said.

    Attributes:
        name: ``student``, ``baseline`` or ``teacher``.
        path: As given.
        detector: The model.
        config: How its images are prepared.
        final: Query of every object in the last layer, per image.
        shown: The answer about the images that are shown.
    """

    name: str
    path: Path
    detector: Detector | ChosenClasses
    config: PreprocessConfig
    final: list[Owners] = field(default_factory=list)
    shown: list[Answer] = field(default_factory=list)


def diagnose(
    run: Path,
    data: str,
    teacher: Path | None,
    baseline: Path | None,
    images: int,
    page: Callable[[Diagnosis, Sequence[Subject], Dataset], str],
) -> Diagnosis:
    """Measures a run and writes ``diagnosis.json`` and ``diagnosis.html`` into its folder.

    Args:
        run: Run directory, or weights in it, of which the files are then called after:
            ``diagnosis-ema.html``.
        data: Images to look at.
        teacher: Run directory, model file or shipped name.
        baseline: Run directory of the same student without a teacher.
        images: At most so many.
        page: Makes the page.

    Raises:
        UserError: ``run-missing`` where the folder is no run, ``diagnose-classes`` for a baseline
            of other classes, ``teacher-classes`` for a teacher that lacks some of the run's, and
            what opening models and data raises.
    """
    folder = run_folder(run)
    if not (folder / "metrics.jsonl").exists():
        raise UserError("run-missing", f"{folder}: not a run directory (it has no metrics.jsonl)")
    detector, info = load_model(find_model(run))
    dataset = open_dataset(data, info.classes, info.preprocess.range)
    subjects = [Subject("student", run, detector, info.preprocess)]
    if baseline is not None:
        subjects.append(_baseline(baseline, info))
    if teacher is not None:
        subjects.append(_teacher(teacher, info.classes.names, _renamed(folder)))
    if len(dataset) == 0:
        raise UserError("data-empty", f"{data}: no images to look at")
    indices = evenly_spaced(len(dataset), images)
    models = [_diagnose_model(subject, dataset, indices) for subject in subjects]
    _compare_with_teacher(models, subjects)
    runs = {"student": folder} | ({} if baseline is None else {"baseline": run_folder(baseline)})
    kept = {name: read_owner_records(path / OWNERS_FILE) for name, path in runs.items()}
    changes = {name: [(k.step, k.student) for k in rows] for name, rows in kept.items()}
    changes["average"] = [(k.step, k.average) for k in kept["student"] if k.average is not None]
    result = Diagnosis(
        run=str(run),
        data=data,
        images=len(indices),
        objects=sum(len(owners) for owners in subjects[0].final),
        models=models,
        instability={name: c for name, rows in changes.items() if (c := _changes(rows))},
        average_consistency=[
            (k.step, consistency(k.student, k.average))
            for k in kept["student"]
            if k.average is not None
        ],
        ap={name: _curve(path, "ap", 100.0) for name, path in runs.items()},
        loss={name: _curve(path, "loss", 1.0) for name, path in runs.items()},
    )
    written = page_path(run)
    write_atomic(written.with_suffix(".json"), result.model_dump_json(indent=2) + "\n")
    write_atomic(written, page(result, subjects, dataset))
    return result


def _baseline(path: Path, student: ModelInfo) -> Subject:
    """A run of the same student; with other classes it is another one.

    Raises:
        UserError: ``diagnose-classes``.
    """
    detector, info = load_model(find_model(path))
    if info.classes.names != student.classes.names:
        raise UserError(
            "diagnose-classes",
            f"{path}: the baseline's classes are {listed(info.classes.names)}, the run's "
            f"{listed(student.classes.names)}",
        )
    return Subject("baseline", path, detector, info.preprocess)


def _teacher(path: Path, wanted: Sequence[str], renamed: Mapping[str, str]) -> Subject:
    """A teacher by the run's classes, which its own are matched with by name as in training."""
    detector, info = load_model(find_model(path))
    columns = columns_of(path, info.classes.names, wanted, renamed)
    if columns == tuple(range(detector.facts.num_classes)):
        return Subject("teacher", path, detector, info.preprocess)
    chosen = ChosenClasses(detector, columns, detector.config.detections).eval()
    return Subject("teacher", path, chosen, info.preprocess)


def _renamed(folder: Path) -> Mapping[str, str]:
    """The teacher's names of renamed classes, as the run's recipe has them."""
    recipe = folder / "recipe.yaml"
    return load_recipe(recipe).teacher_classes if recipe.exists() else {}


def run_folder(run: Path) -> Path:
    """The run directory of a run, or of weights in it."""
    return run.parent if run.is_file() else run


def page_path(run: Path) -> Path:
    """Where the diagnosis of a run, or of weights in it, is written."""
    plain = run.is_dir() or run.stem == "model"
    return run_folder(run) / ("diagnosis.html" if plain else f"diagnosis-{run.stem}.html")


def _diagnose_model(subject: Subject, dataset: Dataset, indices: Sequence[int]) -> ModelDiagnosis:
    """Runs a model over the slice; the last answer of the first batch is kept for pictures."""
    changed: list[int] = []
    counts = torch.zeros(len(THRESHOLDS))
    objects, proposals = 0, False
    for answer in answers(subject.detector, dataset, subject.config, indices, attention=True):
        if not subject.shown:
            subject.shown.append(answer)
        layers = layer_owners(answer)
        proposals = answer.output.group.proposals is not None
        changed = changed or [0] * (len(layers) - 1)
        for i, (before, after) in enumerate(itertools.pairwise(layers)):
            changed[i] += sum(
                a != b
                for old, new in zip(before, after, strict=True)
                for a, b in zip(old, new, strict=True)
            )
        subject.final += layers[-1]
        objects += sum(len(target.labels) for target in answer.targets)
        counts += _queries_above(answer)
    first = "encoder" if proposals else "1"
    names = [first, *(str(i + (1 if proposals else 2)) for i in range(len(changed)))]
    share = 100 / max(1, objects)
    return ModelDiagnosis(
        name=subject.name,
        path=str(subject.path),
        unstable={
            f"{a} to {b}": share * count
            for a, b, count in zip(names, names[1:], changed, strict=False)
        },
        queries_per_object={
            "any" if threshold == -1 else f"{threshold:g}": float(count) / max(1, objects)
            for threshold, count in zip(THRESHOLDS, counts, strict=True)
        },
    )


def _queries_above(answer: Answer) -> torch.Tensor:
    """Queries whose best generalized IoU is above each threshold, summed over images."""
    counts = torch.zeros(len(THRESHOLDS))
    for boxes, target in zip(answer.output.boxes[-1], answer.targets, strict=True):
        if len(target.labels):
            best = pairwise_giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(target.boxes)).amax(1)
            counts += torch.tensor([float((best > t).sum()) for t in THRESHOLDS])
    return counts


def _compare_with_teacher(models: Sequence[ModelDiagnosis], subjects: Sequence[Subject]) -> None:
    teacher = next((s for s in subjects if s.name == "teacher"), None)
    if teacher is None:
        return
    for model, subject in zip(models, subjects, strict=True):
        same = subject.detector.facts.num_queries == teacher.detector.facts.num_queries
        if subject is not teacher and same:
            model.consistency = consistency(subject.final, teacher.final)


def _changes(rows: Sequence[tuple[int, list[Owners]]]) -> Curve:
    """Instability between each validation and the one before."""
    return [
        (step, instability(before, after))
        for (_, before), (step, after) in itertools.pairwise(rows)
    ]


def _curve(run: Path, key: str, factor: float) -> Curve:
    """A value of ``metrics.jsonl`` over finished steps."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = [
        json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")
    ]
    return [(row["step"], factor * row[key]) for row in rows if key in row]
