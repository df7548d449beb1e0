"""The parity gate: does a bundle, in every engine it is meant for, find what torch finds?

The reference is the checkpoint the bundle was made from. Where that or torch is not at hand, as on
a target, ONNX Runtime must reproduce the golden detections torch left in the bundle, and is in turn
the reference of the other engines on the images given.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from detr.data import open_dataset
from detr.errors import UserError
from engines.base import Engine
from engines.bundle import Bundle
from engines.half_emulation import HalfEngine
from engines.open import open_engine
from engines.ort_engine import OrtEngine
from engines.parity import Budget
from engines.verdict import EngineVerdict
from export.parity.budget import default_budget
from export.parity.engines import engine_verdicts, first_line
from export.parity.evidence import write_evidence
from export.parity.samples import Samples
from export.parity.verdict import GateVerdict


def gate_bundle(
    bundle: Bundle,
    data: str | None = None,
    engines: Sequence[str | Engine] = (),
    budget: Budget | None = None,
    images: int | None = None,
    draw: Path | None = None,
    threads: int | None = None,
) -> GateVerdict:
    """Compares a bundle with its checkpoint and writes the verdict into the evidence files.

    Args:
        bundle: The candidate; ONNX Runtime on its graph always is one of the engines.
        data: Data set specification; the bundle's golden images where ``None``.
        engines: Further engines, by name or already open (one built from the bundle).
        budget: What is allowed; the default of the bundle's precision where ``None``.
        images: Use this many images, spread evenly over those of the data that the bundle's canvas
            is meant for.
        draw: Folder for a picture of each engine's worst image.
        threads: Of every engine that takes a number.

    Raises:
        UserError: ``verify-torch`` where torch, the reference, is among the engines; what opening
            the data or an engine raises.
    """
    usual = _of_what_it_finds(bundle, default_budget(bundle.info.precision))
    budget = _of_what_it_finds(bundle, budget or usual)
    golden = bundle.golden()
    reference, notes = _torch(bundle, threads)
    notes = [*notes, *budget.wider_than(usual)]
    samples = Samples.of_golden(golden, with_detections=False)
    if data is not None:
        model = bundle.info.model
        dataset = open_dataset(data, model.classes, model.preprocess.range)
        samples = Samples.of_dataset(dataset, images, model.preprocess)
    names = [engine for engine in dict.fromkeys(engines) if engine != OrtEngine.name]
    opened, verdicts = _open_all(bundle, [OrtEngine.name, *names], samples, budget, notes, threads)
    if reference is not None:
        verdicts += engine_verdicts(bundle, reference, opened, samples, budget, draw, notes)
    else:
        known = Samples.of_golden(golden)
        verdicts += engine_verdicts(bundle, None, opened, known, budget, draw, notes)
        if data is not None and len(opened) > 1 and opened[0].name == OrtEngine.name:
            first, *others = opened
            verdicts += engine_verdicts(bundle, first, others, samples, budget, draw, notes)
    return _with_evidence(bundle, opened, budget, verdicts)


def gate_graph(bundle: Bundle, reference: Engine, samples: Samples) -> GateVerdict:
    """Compares a graph that has just been written with torch, and writes its evidence.

    In ONNX Runtime; one with half precision also with that precision emulated, because ONNX
    Runtime's CPU provider computes it in float32 and would find nothing wrong.

    Args:
        bundle: Its sidecar need not be on the disk yet.
        reference: The torch model.
        samples: Images with what it finds in them.
    """
    budget = _of_what_it_finds(bundle, default_budget(bundle.info.precision))
    engines = [OrtEngine.name]
    if bundle.info.precision != "fp32":
        engines.append(HalfEngine.name)
    opened, verdicts = _open_all(bundle, engines, samples, budget)
    verdicts += engine_verdicts(bundle, reference, opened, samples, budget)
    return _with_evidence(bundle, opened, budget, verdicts)


def _of_what_it_finds(bundle: Bundle, budget: Budget) -> Budget:
    """A budget without what it says of masks, where the bundle finds boxes alone."""
    return budget.of_boxes() if bundle.info.masks is None else budget


def _with_evidence(
    bundle: Bundle, engines: Sequence[Engine], budget: Budget, verdicts: Sequence[EngineVerdict]
) -> GateVerdict:
    """The verdict on the bundle, its evidence written."""
    verdict = GateVerdict(
        bundle=str(bundle.path),
        precision=bundle.info.precision,
        budget=budget,
        engines=tuple(verdicts),
    )
    write_evidence(bundle, engines, verdict)
    return verdict


def _open_all(
    bundle: Bundle,
    engines: Sequence[str | Engine],
    samples: Samples,
    budget: Budget,
    notes: Sequence[str] = (),
    threads: int | None = None,
) -> tuple[list[Engine], list[EngineVerdict]]:
    """Engines that load, and verdicts on those that do not."""
    if "torch" in engines:
        raise UserError(
            "verify-torch",
            "--engine torch: torch is what the others are compared with; leave it out",
        )
    opened: list[Engine] = []
    failed: list[EngineVerdict] = []
    for engine in engines:
        try:
            # One that was rejected before gets another chance.
            if not isinstance(engine, Engine):
                engine = open_engine(bundle, engine, threads, ungated=True)
            opened.append(engine)
        except UserError:
            raise
        except Exception as error:  # the runtimes' own exceptions share no base
            verdict = EngineVerdict(
                engine=str(engine).partition(":")[0],
                reference="torch",
                samples=samples.text(),
                budget=budget,
                status="rejected",
                reasons=(f"the graph does not load: {first_line(error)}",),
                notes=tuple(notes),
            )
            failed.append(verdict)
    return opened, failed


def _torch(bundle: Bundle, threads: int | None = None) -> tuple[Engine | None, list[str]]:
    """The checkpoint the bundle was made from, or why it cannot be the reference."""
    try:
        return open_engine(bundle, "torch", threads, ungated=True), []
    except UserError as error:
        if error.code not in ("bundle-source", "extra-missing"):
            raise
        return None, [
            f"torch was not asked ({error.message}); its detections on the golden images were"
        ]
