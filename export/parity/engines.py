"""Engines judged against a reference, image by image; nothing is written but pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx

from detr.cli_support import progress
from detr.errors import UserError
from detr.files import write_atomic
from detr.metrics import coco_ap
from detr.types import Detections
from engines.base import Engine
from engines.bundle import Bundle
from export import locate
from export.parity.compare import Budget, Outcome, compare
from export.parity.diagnose import diagnose
from export.parity.first_deviation import Deviation
from export.parity.picture import both
from export.parity.samples import Samples
from export.parity.verdict import EngineVerdict, Reference

# The images a batch size other than one is tried with.
_BATCH = 2
_NAMED_IMAGES = 5


@dataclass
class _Run:
    """One engine's way through the images."""

    engine: Engine
    detections: list[Detections] = field(default_factory=list)
    failure: str = ""


def judge(
    bundle: Bundle,
    reference: Engine | None,
    engines: Sequence[Engine],
    samples: Samples,
    budget: Budget,
    draw: Path | None = None,
) -> list[EngineVerdict]:
    """Compares engines with a reference on images.

    Args:
        bundle: Where the engines come from.
        reference: What to compare with. ``None`` where the samples bring its detections along and
            it is not at hand to be asked where the difference begins.
        engines: What to judge.
        samples: The images.
        budget: What is allowed.
        draw: Folder for a picture of each engine's worst image.

    Returns:
        One verdict per engine, in order.

    Raises:
        UserError: ``reference-not-finite`` where the reference itself finds NaN.
    """
    if not engines:
        return []
    runs = [_Run(engine) for engine in engines]
    expected = _detect(reference, runs, samples)
    name: Reference = "golden"
    if reference is not None:
        name = "torch" if reference.name == "torch" else "onnxruntime"
    reference_ap, note = average_precision(samples, expected)
    verdicts = []
    for run in runs:
        verdict = EngineVerdict(
            engine=run.engine.name, reference=name, samples=samples.text(), notes=note
        )
        verdicts.append(verdict)
        symptoms: set[str] = set()
        if run.failure:
            verdict.status, verdict.reasons = "rejected", [f"does not run: {run.failure}"]
        else:
            _decide(verdict, expected, run, samples, budget, reference_ap)
        renamed = "" if reference is None else _renamed(reference, run.engine)
        if renamed:
            symptoms.add("classes")
            verdict.status, verdict.reasons = "rejected", [*_told(verdict), renamed]
        if verdict.status != "rejected":
            batch = _other_batch(run.engine, samples, run.detections, budget)
            if batch:
                symptoms.add("batch")
                verdict.status, verdict.reasons = "rejected", [*_told(verdict), batch]
        if verdict.status == "rejected":
            try:
                _explain(verdict, bundle, reference, run, samples, symptoms)
            except Exception as error:  # a rejection stands, whatever its explanation comes to
                verdict.notes.append(f"where it begins was not found: {first_line(error)}")
        if draw is not None and verdict.parity is not None:
            verdict.notes.append(_draw(draw, verdict, bundle, expected, run, samples, budget))
    return verdicts


def _told(verdict: EngineVerdict) -> list[str]:
    """The reasons of a rejection; too little to judge by is none."""
    return verdict.reasons if verdict.status == "rejected" else []


def _renamed(reference: Engine, engine: Engine) -> str:
    """How the classes of an engine differ from the reference's; detections are indices only."""
    wanted, found = reference.info.classes, engine.info.classes
    if wanted == found:
        return ""
    if len(wanted) != len(found):
        return f"{len(found)} classes in the bundle, {len(wanted)} in the checkpoint"
    pairs = [list(zip(c.names, c.category_ids, strict=True)) for c in (wanted, found)]
    k = next(k for k, (a, b) in enumerate(zip(*pairs, strict=True)) if a != b)
    (name, number), (other, other_number) = pairs[0][k], pairs[1][k]
    return (
        f"class {k} is {other} (id {other_number}) in the bundle and {name} (id {number}) in the "
        "checkpoint"
    )


def _draw(
    folder: Path,
    verdict: EngineVerdict,
    bundle: Bundle,
    expected: Sequence[Detections],
    run: _Run,
    samples: Samples,
    budget: Budget,
) -> str:
    """Draws the worst image; returns where, or why there is no picture."""
    assert verdict.parity is not None
    k = verdict.parity.worst_image
    names = bundle.info.model.classes.names
    upper, lower = (
        (title, _drawable(found.above(budget.threshold), len(names)))
        for title, found in (
            (verdict.reference, expected[k]),
            (run.engine.name, run.detections[k]),
        )
    )
    path = folder / f"{run.engine.name}-{Path(samples.names[k]).stem}.png"
    try:
        write_atomic(path, both(samples.image(k), upper, lower, names))
    except UserError as error:
        return f"no picture: {error.message}"
    return f"{path}: {upper[0]} above, {lower[0]} below"


def _drawable(found: Detections, classes: int) -> Detections:
    """What lies somewhere; a class there is not loses its name."""
    finite = np.isfinite(found.boxes).all(1)
    labels = np.where((found.labels >= 0) & (found.labels < classes), found.labels, -1)
    return Detections(found.boxes[finite], found.scores[finite], labels[finite])


def _detect(reference: Engine | None, runs: Sequence[_Run], samples: Samples) -> list[Detections]:
    """Every image through every engine, decoded once; returns the reference's detections."""
    expected: list[Detections] = list(samples.known or ())
    # Graphs with a static batch are filled up otherwise, and most of the work thrown away.
    step = max((run.engine.batch_size or 1 for run in runs), default=1)
    for start in progress(range(0, len(samples), step), "verify"):
        images = [samples.image(i) for i in range(start, min(start + step, len(samples)))]
        if samples.known is None:
            assert reference is not None, "nothing to compare with"
            expected += [one for image in images for one in reference([image])]
        for run in runs:
            if run.failure:
                continue
            try:
                size = run.engine.batch_size or 1
                for k in range(0, len(images), size):
                    some = images[k : k + size]
                    found = run.engine(some)
                    if len(found) != len(some):
                        raise ValueError(f"{len(found)} answers to {len(some)} images")
                    run.detections += found
            except UserError:
                raise
            except Exception as error:  # the runtimes' own exceptions share no base
                run.failure = first_line(error)
    for position, one in enumerate(expected):
        if not _finite(one):
            raise UserError(
                "reference-not-finite",
                f"{samples.names[position]}: the reference itself finds NaN or infinity; "
                "the checkpoint is broken",
            )
    return expected


def _finite(found: Detections) -> bool:
    return bool(np.isfinite(found.boxes).all() and np.isfinite(found.scores).all())


def _decide(
    verdict: EngineVerdict,
    expected: Sequence[Detections],
    run: _Run,
    samples: Samples,
    budget: Budget,
    reference_ap: float | None,
) -> None:
    """Fills in the figures and the status."""
    classes = len(run.engine.info.classes)
    nameless = sum(int(((d.labels < 0) | (d.labels >= classes)).sum()) for d in run.detections)
    if nameless:
        reference_ap = None  # there is no evaluating what no class is meant by
    result = outcome(samples, expected, run.detections, reference_ap, budget)
    parity = verdict.parity = result.parity
    verdict.ap, verdict.reference_ap = result.ap, result.reference_ap
    verdict.reasons = result.over(budget)
    if nameless:
        verdict.reasons.append(f"{nameless} detections of no class (there are {classes})")
    if verdict.reasons:
        verdict.status = "rejected"
        worst = parity.deviating or [parity.worst_image]
        verdict.images = [samples.names[i] for i in worst[:_NAMED_IMAGES]]
    elif parity.detections < budget.detections:
        verdict.status = "undecided"
        verdict.reasons = [
            f"too few detections to judge: {verdict.reference} finds {parity.detections} above "
            f"{budget.threshold:g} on {verdict.samples}, {budget.detections} are needed; give "
            "--data with objects in it, or a --budget with a lower threshold"
        ]


def outcome(
    samples: Samples,
    expected: Sequence[Detections],
    found: Sequence[Detections],
    reference_ap: float | None,
    budget: Budget,
) -> Outcome:
    """How far a graph's detections are from the reference's, AP included where it has one."""
    parity = compare(expected, found, budget=budget)
    ap = None
    if reference_ap is not None and parity.not_finite == 0:
        ap, _ = average_precision(samples, found)
    return Outcome(parity=parity, ap=ap, reference_ap=reference_ap)


def average_precision(
    samples: Samples, detections: Sequence[Detections]
) -> tuple[float | None, list[str]]:
    """COCO AP, or why there is none."""
    if samples.dataset is None:
        return None, []
    try:
        return coco_ap.evaluate(samples.dataset, detections, samples.indices).ap, []
    except UserError as error:
        if error.code == "detections-not-finite":
            raise
        return None, [f"AP was not compared: {error.message}"]


def _other_batch(
    engine: Engine, samples: Samples, alone: Sequence[Detections], budget: Budget
) -> str:
    """What is wrong at a batch size other than one, for an engine that promises any."""
    count = min(_BATCH, len(samples))
    if engine.batch_size is not None or count < 2:
        return ""
    try:
        together = engine([samples.image(i) for i in range(count)])
    except Exception as error:  # the runtimes' own exceptions share no base
        return f"fails at batch {count}: {first_line(error)}"
    reasons = compare(alone[:count], together, budget).over(budget)
    return f"answers otherwise at batch {count}: {', '.join(reasons)}" if reasons else ""


def first_line(error: Exception) -> str:
    """What an exception says, in one line of bearable length."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _explain(
    verdict: EngineVerdict,
    bundle: Bundle,
    reference: Engine | None,
    run: _Run,
    samples: Samples,
    symptoms: set[str],
) -> None:
    """Looks for the first layer to deviate and for a known mistake."""
    engine = run.engine
    if verdict.parity is not None:
        symptoms |= locate.symptoms(verdict.parity)
        if reference is not None and "batch" not in symptoms:
            image = samples.image(verdict.parity.worst_image)
            seen = locate.input_symptoms(reference, engine, image)
            symptoms |= seen
            if seen:
                verdict.deviation = Deviation(layer="preprocessing")
            else:
                verdict.deviation = locate.locate(bundle, reference, engine, image)
    deviation = verdict.deviation or Deviation(layer="")
    operators = set(deviation.operators)
    if "MSDeformAttn" in operators:
        functions = onnx.load(str(bundle.model), load_external_data=False).functions
        operators |= {node.op_type for function in functions for node in function.node}
    verdict.pitfall = diagnose(symptoms, deviation, operators, bundle.info.precision, engine.name)
