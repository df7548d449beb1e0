"""The parity gate: does a bundle, in every engine it is meant for, find what torch finds?

The reference is the checkpoint the bundle was made from. Where that or torch is not at hand, as on
a target, ONNX Runtime must reproduce the golden detections torch left in the bundle, and is in turn
the reference of the other engines on the images given.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from detr.data import open_dataset
from detr.errors import UserError
from engines.base import Engine
from engines.bundle import Bundle
from engines.half_emulation import HalfEngine
from engines.open import open_engine
from engines.ort_engine import OrtEngine
from engines.trt.backend import BACKENDS
from export.parity.budget import default_budget
from export.parity.compare import Budget
from export.parity.engines import first_line, judge
from export.parity.evidence import record
from export.parity.samples import Samples
from export.parity.verdict import EngineVerdict, GateVerdict


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
        UserError: ``verify-torch`` where torch, the reference, is among the engines; what opening
            the data or an engine raises.
    """
    usual = default_budget(bundle.info.precision)
    budget = budget or usual
    golden = bundle.golden()
    reference, note = _torch(bundle)
    samples = Samples.of_golden(golden, ask_again=True)
    if data is not None:
        model = bundle.info.model
        dataset = open_dataset(data, model.classes, model.preprocess.range)
        samples = Samples.of_dataset(dataset, images)
    names = [engine for engine in dict.fromkeys(engines) if engine != OrtEngine.name]
    opened, found = _open_all(bundle, [OrtEngine.name, *names], samples)
    if reference is not None:
        found += judge(bundle, reference, opened, samples, budget, draw)
    else:
        found += judge(bundle, None, opened, Samples.of_golden(golden), budget, draw)
        if data is not None and len(opened) > 1 and opened[0].name == OrtEngine.name:
            found += judge(bundle, opened[0], opened[1:], samples, budget, draw)
    for verdict in found:
        verdict.notes += [note] if note else []
        verdict.notes += budget.wider_than(usual)
    return _recorded(bundle, opened, budget, found)


def verify_graph(bundle: Bundle, reference: Engine, samples: Samples) -> GateVerdict:
    """Compares a graph that has just been written with torch, and writes its evidence.

    In ONNX Runtime; one with half precision also with that precision emulated, because ONNX
    Runtime's CPU provider computes it in float32 and would find nothing wrong.

    Args:
        bundle: Its sidecar need not be on the disk yet.
        reference: The torch model.
        samples: Images with what it finds in them.
    """
    budget = default_budget(bundle.info.precision)
    engines = [OrtEngine.name]
    if bundle.info.precision != "fp32":
        engines.append(HalfEngine.name)
    opened, found = _open_all(bundle, engines, samples)
    found += judge(bundle, reference, opened, samples, budget)
    return _recorded(bundle, opened, budget, found)


def _recorded(
    bundle: Bundle, engines: Sequence[Engine], budget: Budget, found: list[EngineVerdict]
) -> GateVerdict:
    result = GateVerdict(
        bundle=str(bundle.path), precision=bundle.info.precision, budget=budget, engines=found
    )
    record(bundle, engines, result)
    return result


def _open_all(
    bundle: Bundle, wanted: Sequence[str | Engine], samples: Samples
) -> tuple[list[Engine], list[EngineVerdict]]:
    """Engines that load, and verdicts on those that do not."""
    opened: list[Engine] = []
    failed: list[EngineVerdict] = []
    for engine in wanted:
        try:
            opened.append(engine if isinstance(engine, Engine) else _open(bundle, engine))
        except UserError:
            raise
        except Exception as error:  # the runtimes' own exceptions share no base
            verdict = EngineVerdict(
                engine=str(engine).partition(":")[0],
                reference="torch",
                samples=samples.text(),
                status="rejected",
                reasons=[f"the graph does not load: {first_line(error)}"],
            )
            failed.append(verdict)
    return opened, failed


def _open(bundle: Bundle, engine: str) -> Engine:
    """An engine to be judged: one that was rejected before gets another chance."""
    # The sidecar of a bundle that is being made is not on the disk yet.
    for kind in (OrtEngine, HalfEngine):
        if engine == kind.name:
            return kind(bundle)
    if engine == "torch":
        raise UserError(
            "verify-torch",
            "--engine torch: torch is what the others are compared with; leave it out",
        )
    backend = BACKENDS.get(engine.partition(":")[0])
    with warnings.catch_warnings():
        # They say what the last verdict was, or that there is none, which is about to change.
        warnings.simplefilter("ignore")
        if backend is not None:
            from engines.trt.engine import open_trt

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
