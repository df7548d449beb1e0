"""Verdicts on engines: each against a reference, image by image; nothing is written but pictures.

A verdict is put together at the end, of findings that are computed one by one and never changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from detr.cli_support import progress
from detr.errors import UserError
from detr.files import write_atomic
from detr.types import Detections
from engines.base import Engine
from engines.bundle import Bundle
from engines.parity import Budget, Outcome
from engines.verdict import Deviation, EngineVerdict, Pitfall, Reference, Status, Symptom
from export.parity.compare import compare_detections
from export.parity.diagnose import diagnose, input_symptoms, symptoms
from export.parity.first_deviation import first_deviation
from export.parity.outcome import outcome, samples_ap
from export.parity.picture import comparison_picture
from export.parity.samples import Samples

# The images a batch size other than one is tried with.
_BATCH = 2
_NAMED_IMAGES = 5
# Engines that a graph is made from; every other one runs the graph itself.
_REFERENCES: Mapping[str, Reference] = {"torch": "torch", "original": "original"}


@dataclass(frozen=True)
class _Run:
    """What came of an engine's way through the images: detections, or why there are none."""

    engine: Engine
    detections: Sequence[Detections] = ()
    failure: str = ""


@dataclass(frozen=True)
class _Baseline:
    """What engines are compared with; ``engine`` is ``None`` where only its detections are left."""

    bundle: Bundle
    engine: Engine | None
    name: Reference
    samples: Samples
    detections: Sequence[Detections]
    ap: float | None
    budget: Budget


@dataclass(frozen=True)
class _Explanation:
    """Where a rejected engine begins to deviate and what it looks like, as far as was found out."""

    deviation: Deviation | None = None
    pitfall: Pitfall | None = None
    notes: tuple[str, ...] = ()


def engine_verdicts(
    bundle: Bundle,
    reference: Engine | None,
    engines: Sequence[Engine],
    samples: Samples,
    budget: Budget,
    draw: Path | None = None,
    notes: Sequence[str] = (),
) -> list[EngineVerdict]:
    """Compares engines with a reference on images.

    Args:
        bundle: Where the engines come from.
        reference: What to compare with. ``None`` where the samples bring its detections along and
            it is not at hand to be asked where the difference begins.
        engines: The candidates.
        samples: The images.
        budget: What is allowed.
        draw: Folder for a picture of each engine's worst image.
        notes: What a reader of every verdict should know besides.

    Returns:
        One verdict per engine, in order.

    Raises:
        UserError: ``reference-not-finite`` where the reference itself finds NaN.
    """
    if not engines:
        return []
    expected, runs = _run_all(reference, engines, samples)
    name: Reference = "golden"
    if reference is not None:
        name = _REFERENCES.get(reference.name, "onnxruntime")
    ap, ap_notes = samples_ap(samples, expected)
    baseline = _Baseline(bundle, reference, name, samples, expected, ap, budget)
    return [_verdict(baseline, run, draw, ap_notes, tuple(notes)) for run in runs]


def _verdict(
    baseline: _Baseline,
    run: _Run,
    draw: Path | None,
    first_notes: tuple[str, ...],
    last_notes: tuple[str, ...],
) -> EngineVerdict:
    samples, budget = baseline.samples, baseline.budget
    figures = None if run.failure else _figures(baseline, run)
    violations = _violations(run, figures, budget)
    renamed = _renamed_classes(baseline.engine, run.engine)
    wrong = [*violations, *renamed]
    batch = [] if wrong else _batch_faults(baseline, run)
    wrong += batch
    undecided = [] if wrong or figures is None else _undecided(baseline, figures)
    status: Status = "rejected" if wrong else "undecided" if undecided else "accepted"
    explanation = _Explanation()
    if status == "rejected":
        given: set[Symptom] = set()
        given |= {"classes"} if renamed else set()
        given |= {"batch"} if batch else set()
        explanation = _explanation(baseline, run, figures, given)
    picture: tuple[str, ...] = ()
    if draw is not None and figures is not None:
        picture = (_draw(draw, baseline, run, figures.parity.worst_image),)
    parity = None if figures is None else figures.parity
    worst = (parity.deviating or (parity.worst_image,)) if parity is not None and violations else ()
    return EngineVerdict(
        engine=run.engine.name,
        reference=baseline.name,
        samples=samples.text(),
        budget=budget,
        status=status,
        reasons=tuple(wrong or undecided),
        notes=(*first_notes, *explanation.notes, *picture, *last_notes),
        parity=parity,
        ap=None if figures is None else figures.ap,
        reference_ap=None if figures is None else figures.reference_ap,
        images=tuple(samples.names[i] for i in worst[:_NAMED_IMAGES]),
        deviation=explanation.deviation,
        pitfall=explanation.pitfall,
    )


def _run_all(
    reference: Engine | None, engines: Sequence[Engine], samples: Samples
) -> tuple[list[Detections], list[_Run]]:
    """Every image through every engine, decoded once; the reference's detections come first."""
    expected: list[Detections] = list(samples.detections or ())
    detections: list[list[Detections]] = [[] for _ in engines]
    failures = [""] * len(engines)
    # Graphs with a static batch are filled up otherwise, and most of the work thrown away.
    step = max(engine.batch_size or 1 for engine in engines)
    for start in progress(range(0, len(samples), step), "verify"):
        images = [samples.image(i) for i in range(start, min(start + step, len(samples)))]
        if samples.detections is None:
            assert reference is not None, "nothing to compare with"
            expected += [one for image in images for one in reference([image])]
        for k, engine in enumerate(engines):
            if failures[k]:
                continue
            try:
                size = engine.batch_size or 1
                for first in range(0, len(images), size):
                    some = images[first : first + size]
                    answers = engine(some)
                    if len(answers) != len(some):
                        raise ValueError(f"{len(answers)} answers to {len(some)} images")
                    detections[k] += answers
            except UserError:
                raise
            except Exception as error:  # the runtimes' own exceptions share no base
                failures[k] = first_line(error)
    for position, one in enumerate(expected):
        if not (np.isfinite(one.boxes).all() and np.isfinite(one.scores).all()):
            raise UserError(
                "reference-not-finite",
                f"{samples.names[position]}: the reference itself finds NaN or infinity; "
                "the checkpoint is broken",
            )
    runs = [_Run(*one) for one in zip(engines, detections, failures, strict=True)]
    return expected, runs


def _classless(run: _Run) -> int:
    """Number of detections whose label is no class of the engine's."""
    classes = len(run.engine.info.classes)
    return sum(int(((d.labels < 0) | (d.labels >= classes)).sum()) for d in run.detections)


def _figures(baseline: _Baseline, run: _Run) -> Outcome:
    # There is no evaluating what no class is meant by.
    ap = None if _classless(run) else baseline.ap
    return outcome(baseline.samples, baseline.detections, run.detections, ap, baseline.budget)


def _violations(run: _Run, figures: Outcome | None, budget: Budget) -> list[str]:
    """What of an engine's detections exceeds the budget."""
    if figures is None:
        return [f"does not run: {run.failure}"]
    classless, classes = _classless(run), len(run.engine.info.classes)
    label = [f"{classless} detections of no class (there are {classes})"] if classless else []
    return figures.violations(budget) + label


def _undecided(baseline: _Baseline, figures: Outcome) -> list[str]:
    """Why an engine within the budget is not accepted all the same."""
    budget, count = baseline.budget, figures.parity.detections
    if count >= budget.detections:
        return []
    return [
        f"too few detections to judge: {baseline.name} finds {count} above "
        f"{budget.threshold:g} on {baseline.samples.text()}, {budget.detections} are needed; give "
        "--data with objects in it, or a --budget with a lower threshold"
    ]


def _renamed_classes(reference: Engine | None, engine: Engine) -> list[str]:
    """How the classes of an engine differ from the reference's; detections are indices only."""
    if reference is None or reference.info.classes == engine.info.classes:
        return []
    wanted, found = reference.info.classes, engine.info.classes
    if len(wanted) != len(found):
        return [f"{len(found)} classes in the bundle, {len(wanted)} in the checkpoint"]
    pairs = [list(zip(c.names, c.category_ids, strict=True)) for c in (wanted, found)]
    k = next(k for k, (a, b) in enumerate(zip(*pairs, strict=True)) if a != b)
    (name, number), (other, other_number) = pairs[0][k], pairs[1][k]
    return [
        f"class {k} is {other} (id {other_number}) in the bundle and {name} (id {number}) in the "
        "checkpoint"
    ]


def _batch_faults(baseline: _Baseline, run: _Run) -> list[str]:
    """What is wrong at a batch size other than one, for an engine that promises any."""
    engine, samples, budget = run.engine, baseline.samples, baseline.budget
    count = min(_BATCH, len(samples))
    if engine.batch_size is not None or count < 2:
        return []
    try:
        together = engine([samples.image(i) for i in range(count)])
    except Exception as error:  # the runtimes' own exceptions share no base
        return [f"fails at batch {count}: {first_line(error)}"]
    reasons = compare_detections(run.detections[:count], together, budget).violations(budget)
    return [f"answers otherwise at batch {count}: {', '.join(reasons)}"] if reasons else []


def first_line(error: Exception) -> str:
    """What an exception says, in one line of bearable length."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _explanation(
    baseline: _Baseline, run: _Run, figures: Outcome | None, given: set[Symptom]
) -> _Explanation:
    """Looks for the first layer to deviate and for a known mistake."""
    bundle, engine = baseline.bundle, run.engine
    try:
        kinds, deviation = given, None
        if figures is not None:
            kinds = kinds | symptoms(figures.parity)
            if baseline.engine is not None and "batch" not in kinds:
                image = baseline.samples.image(figures.parity.worst_image)
                inputs = input_symptoms(baseline.engine, engine, image)
                kinds = kinds | inputs
                if inputs:
                    deviation = Deviation(layer="preprocessing")
                else:
                    deviation = first_deviation(bundle, baseline.engine, engine, image)
        start = deviation or Deviation(layer="")
        operators = set(start.operators)
        if "MSDeformAttn" in operators:
            functions = onnx.load(str(bundle.model), load_external_data=False).functions
            operators |= {node.op_type for function in functions for node in function.node}
        pitfall = diagnose(kinds, start, operators, bundle.info, engine.name)
    except Exception as error:  # a rejection stands, whatever its explanation comes to
        return _Explanation(notes=(f"where it begins was not found: {first_line(error)}",))
    return _Explanation(deviation, pitfall)


def _draw(folder: Path, baseline: _Baseline, run: _Run, image: int) -> str:
    """Draws an image with both sets of boxes; returns where, or why there is no picture."""
    samples, names = baseline.samples, baseline.bundle.info.model.classes.names
    upper, lower = (
        (title, _drawable(detections.above(baseline.budget.threshold), len(names)))
        for title, detections in (
            (baseline.name, baseline.detections[image]),
            (run.engine.name, run.detections[image]),
        )
    )
    path = folder / f"{run.engine.name}-{Path(samples.names[image]).stem}.png"
    try:
        write_atomic(path, comparison_picture(samples.image(image), upper, lower, names))
    except UserError as error:
        return f"no picture: {error.message}"
    return f"{path}: {upper[0]} above, {lower[0]} below"


def _drawable(found: Detections, classes: int) -> Detections:
    """What lies somewhere; a class there is not loses its name."""
    finite = np.isfinite(found.boxes).all(1)
    labels = np.where((found.labels >= 0) & (found.labels < classes), found.labels, -1)
    named = Detections(found.boxes, found.scores, labels, found.masks)
    return named.take(np.flatnonzero(finite))
