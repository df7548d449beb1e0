"""The parity gate: does a bundle, in every engine it is meant for, find what torch finds?

The reference is the checkpoint the bundle was made from. Where that or torch is not at hand, as on
a target, ONNX Runtime must reproduce the golden detections torch left in the bundle, and is in turn
the reference of the other engines on the images given.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from bench import coco_ap
from detr.cli_support import progress
from detr.data import open_dataset
from detr.errors import UserError
from detr.files import sha256, write_atomic
from detr.types import Detections
from engines.base import Engine
from engines.bundle import Bundle
from engines.evidence import EVIDENCE, Evidence, read_evidence
from engines.open import open_engine
from engines.ort_engine import OrtEngine
from engines.trt.backend import BACKENDS
from export import locate
from export.budget import default_budget
from export.deviation import Deviation
from export.gate import STATUSES, EngineVerdict, GateVerdict, Reference
from export.parity import Budget, compare
from export.picture import both
from export.pitfalls import diagnose
from export.samples import Samples

# The images a batch size other than one is tried with.
_BATCH = 2
_NAMED_IMAGES = 5


def verify(
    bundle: Bundle,
    data: str | None = None,
    engines: Sequence[str | Engine] = (),
    budget: Budget | None = None,
    images: int | None = None,
    draw: Path | None = None,
) -> GateVerdict:
    """Compares a bundle with its checkpoint and writes the verdict into the evidence files.

    Args:
        bundle: What to judge; ONNX Runtime on its graph always is.
        data: Data set specification; the bundle's golden images where ``None``.
        engines: Further engines, by name or already open (one built from the bundle).
        budget: What is allowed; the default of the bundle's precision where ``None``.
        images: Use this many images, spread evenly over the data.
        draw: Folder for a picture of each engine's worst image.

    Raises:
        UserError: What opening the data or an engine raises.
    """
    budget = budget or default_budget(bundle.info.precision)
    golden = bundle.golden()
    reference, note = _torch(bundle)
    samples = Samples.of_golden(golden, ask_again=True)
    if data is not None:
        samples = Samples.of_dataset(open_dataset(data, bundle.info.model.classes), images)
    opened = [_open(bundle, engine) for engine in dict.fromkeys(engines)]
    opened = [engine for engine in opened if engine.name != OrtEngine.name]
    ort, failure = _open_ort(bundle)
    if ort is None:
        found = [_unloadable(samples, failure)]
    elif reference is not None:
        found = judge(bundle, reference, [ort, *opened], samples, budget, draw)
    else:
        known = Samples.of_golden(golden)
        found = judge(bundle, None, [ort, *opened], known, budget, draw)
        if data is not None and opened:
            found += judge(bundle, ort, opened, samples, budget, draw)
        for verdict in found:
            verdict.notes.append(note)
    result = GateVerdict(
        bundle=str(bundle.path), precision=bundle.info.precision, budget=budget, engines=found
    )
    record(bundle, [*([ort] if ort else []), *opened], result)
    return result


def verify_graph(bundle: Bundle, reference: Engine, samples: Samples) -> GateVerdict:
    """Compares a graph that has just been written, in ONNX Runtime, and writes its evidence.

    Args:
        bundle: Its sidecar need not be on the disk yet.
        reference: The torch model.
        samples: Images with what it finds in them.
    """
    budget = default_budget(bundle.info.precision)
    ort, failure = _open_ort(bundle)
    found = [_unloadable(samples, failure)]
    if ort is not None:
        found = judge(bundle, reference, [ort], samples, budget)
    result = GateVerdict(
        bundle=str(bundle.path), precision=bundle.info.precision, budget=budget, engines=found
    )
    record(bundle, [ort] if ort else [], result)
    return result


def _unloadable(samples: Samples, failure: str) -> EngineVerdict:
    return EngineVerdict(
        engine=OrtEngine.name,
        reference="torch",
        samples=samples.text(),
        status="rejected",
        reasons=[f"the graph does not load: {failure}"],
    )


def _open(bundle: Bundle, engine: str | Engine) -> Engine:
    """An engine to be judged: one that was rejected before gets another chance."""
    if isinstance(engine, Engine):
        return engine
    backend = BACKENDS.get(engine.partition(":")[0])
    if backend is not None:
        from engines.trt.engine import open_trt

        with warnings.catch_warnings():
            # It says that the engine has never been compared, which is about to change.
            warnings.simplefilter("ignore")
            return open_trt(bundle, backend, allow_rejected=True)
    return open_engine(bundle.path, engine)


def _torch(bundle: Bundle) -> tuple[Engine | None, str]:
    """The checkpoint the bundle was made from, or why it cannot be the reference."""
    from engines.torch_engine import TorchEngine, bundle_weights

    try:
        return TorchEngine(bundle_weights(bundle)), ""
    except UserError as error:
        if error.code not in ("bundle-source", "extra-missing"):
            raise
        return None, (
            f"torch was not asked ({error.message}); its detections on the golden images were"
        )


def _open_ort(bundle: Bundle) -> tuple[OrtEngine | None, str]:
    try:
        return OrtEngine(bundle), ""
    except Exception as error:  # the runtime's own exceptions share no base
        return None, _first_line(error)


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
    """Compares engines with a reference on images; writes nothing.

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
    runs = [_Run(engine) for engine in engines]
    expected = _detect(reference, runs, samples)
    name: Reference = "golden"
    if reference is not None:
        name = "torch" if reference.name == "torch" else "onnxruntime"
    reference_ap, note = _ap(samples, expected)
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
        if verdict.status == "accepted" or not verdict.reasons:
            batch = _other_batch(run.engine, samples, run.detections, budget)
            if batch:
                symptoms.add("batch")
                verdict.status, verdict.reasons = "rejected", [*verdict.reasons, batch]
        if verdict.status == "rejected":
            _explain(verdict, bundle, reference, run, samples, symptoms)
        if draw is not None and verdict.parity is not None:
            k = verdict.parity.worst_image
            picture = both(
                samples.image(k),
                (name, expected[k].above(budget.threshold)),
                (run.engine.name, run.detections[k].above(budget.threshold)),
                bundle.info.model.classes.names,
            )
            path = draw / f"{run.engine.name}-{Path(samples.names[k]).stem}.png"
            write_atomic(path, picture)
            verdict.notes.append(f"{path}: {name} above, {run.engine.name} below")
    return verdicts


def _detect(reference: Engine | None, runs: Sequence[_Run], samples: Samples) -> list[Detections]:
    """Every image through every engine, decoded once; returns the reference's detections."""
    expected: list[Detections] = list(samples.known or ())
    # Graphs with a static batch are filled up otherwise, and most of the work thrown away.
    step = max((run.engine.batch_size or 1 for run in runs), default=1)
    for start in progress(range(0, len(samples), step), "verify"):
        images = [samples.image(i) for i in range(start, min(start + step, len(samples)))]
        if samples.known is None:
            assert reference is not None, "nothing to compare with"
            expected += [found for image in images for found in reference([image])]
        for run in runs:
            if run.failure:
                continue
            try:
                size = run.engine.batch_size or 1
                for k in range(0, len(images), size):
                    run.detections += run.engine(images[k : k + size])
            except UserError:
                raise
            except Exception as error:  # the runtimes' own exceptions share no base
                run.failure = _first_line(error)
    for position, found in enumerate(expected):
        if not _finite(found):
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
    parity = verdict.parity = compare(expected, run.detections, budget)
    verdict.reasons = parity.over(budget)
    if reference_ap is not None and parity.not_finite == 0:
        verdict.reference_ap = reference_ap
        verdict.ap, _ = _ap(samples, run.detections)
        assert verdict.ap is not None
        gap = abs(verdict.ap - reference_ap)
        if not gap <= budget.ap:
            verdict.reasons.append(
                f"AP {verdict.ap:.4f} instead of {reference_ap:.4f} (at most {budget.ap:g} apart)"
            )
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


def _ap(samples: Samples, detections: Sequence[Detections]) -> tuple[float | None, list[str]]:
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
        return f"fails at batch {count}: {_first_line(error)}"
    reasons = compare(alone[:count], together, budget).over(budget)
    return f"answers otherwise at batch {count}: {', '.join(reasons)}" if reasons else ""


def _first_line(error: Exception) -> str:
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


def record(bundle: Bundle, engines: Sequence[Engine], verdict: GateVerdict) -> None:
    """Writes verdicts into the evidence file beside each artefact.

    Verdicts of other engines on the same file are kept; one rejection makes the file rejected.
    """
    by_folder: dict[Path, list[Engine]] = {}
    for engine in engines:
        by_folder.setdefault(engine.artefact.parent, []).append(engine)
    if not engines:
        by_folder[bundle.path] = []
    for folder, members in by_folder.items():
        names = {engine.name for engine in members} or {"onnxruntime"}
        artefact = members[0].artefact if members else bundle.model
        evidence = _evidence(folder, artefact, bundle)
        found: dict[str, dict[str, Any]] = dict(evidence.verdicts)
        for name in names:
            entries = [e for e in verdict.engines if e.engine == name]
            worst = max(entries, key=lambda entry: STATUSES.index(entry.status))
            found[name] = worst.model_dump(mode="json") | {"budget": verdict.budget.model_dump()}
        rejected = [(k, v) for k, v in found.items() if v["status"] == "rejected"]
        undecided = any(v["status"] == "undecided" for v in found.values())
        evidence.model_copy(
            update={
                "verdicts": found,
                "status": "rejected" if rejected else "unverified" if undecided else "accepted",
                "reasons": tuple(f"{k}: {reason}" for k, v in rejected for reason in v["reasons"]),
            }
        ).write(folder)


def _evidence(folder: Path, artefact: Path, bundle: Bundle) -> Evidence:
    """The evidence there is, if it speaks of this very artefact, else new evidence."""
    digest = sha256(artefact)
    if (folder / EVIDENCE).exists():
        evidence = read_evidence(folder)
        if evidence.sha256 == digest:
            return evidence
    return unverified(bundle)


def unverified(bundle: Bundle) -> Evidence:
    """Evidence of a graph nobody has compared with anything."""
    digest = sha256(bundle.model)
    return Evidence(
        artefact=bundle.model.name, sha256=digest, bundle_sha256=digest, backend=OrtEngine.name
    )
