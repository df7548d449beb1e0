"""What a precision costs and brings, measured: average precision, latency and size side by side."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter

import numpy as np
import onnx
from onnx import ModelProto

from detr.cli_support import progress
from detr.data import Dataset
from detr.data.preprocess import Inputs, preprocess
from detr.model_info import BundledInfo
from detr.types import Detections
from engines.bundle import MODEL, Bundle, BundleInfo, Source, outputs_of
from engines.half_emulation import half_session
from engines.msda_function import Lowering
from engines.open import open_engine
from engines.precision_report import PrecisionComparison, PrecisionRow
from export.parity.budget import default_budget
from export.parity.outcome import outcome, samples_ap
from export.parity.samples import Samples
from export.precision.ranges import fill
from export.precision.trial import session_detections

_MOST_IMAGES = 500
_ROUNDS = 20
# Less than this share of the time is a gain; anything closer is the machine's mood.
_GAIN = 0.95


def compare_precisions(
    variants: Mapping[str, ModelProto],
    info: BundledInfo,
    dataset: Dataset,
    batch: int,
    lowering: Lowering,
) -> PrecisionComparison:
    """Measures graphs of the same weights, each against the first and its precision's budget.

    Args:
        variants: Graphs by name; float32 first.
        info: What the model is.
        dataset: At most 500 of its images are used, spread evenly over those meant for the canvas;
            AP is measured where they have labels.
        batch: Images per run.
        lowering: Body of their attention function.
    """
    samples = Samples.of_dataset(dataset, _MOST_IMAGES, info.preprocess)
    exact = {name: half_session(model) for name, model in variants.items()}
    candidates: dict[str, list[Detections]] = {name: [] for name in variants}
    feeds: list[Inputs] = []
    for start in progress(range(0, len(samples), batch), "measuring precision"):
        count = min(batch, len(samples) - start)
        images = [samples.image(start + k) for k in range(count)]
        feed = preprocess(fill(images, batch), info.preprocess)
        feeds = [*feeds, feed][:_ROUNDS]
        for name, session in exact.items():
            candidates[name] += session_detections(session, feed)[: len(images)]
    engine, times = _times(variants, info, feeds, lowering)
    expected = next(iter(candidates.values()))
    reference_ap, _ = samples_ap(samples, expected)
    rows = []
    for name, model in variants.items():
        budget = default_budget(name.split()[0])
        result = outcome(samples, expected, candidates[name], reference_ap, budget)
        rows.append(
            PrecisionRow(
                name=name,
                ap=result.ap,
                violations=tuple(result.violations(budget)),
                cpu_ms=times[name],
                size_mb=model.ByteSize() / 1e6,
            )
        )
    return PrecisionComparison(
        images=len(samples), batch=batch, engine=engine, rows=tuple(rows), advice=()
    )


def _times(
    variants: Mapping[str, ModelProto],
    info: BundledInfo,
    feeds: Sequence[Inputs],
    lowering: Lowering,
) -> tuple[str, dict[str, float]]:
    """An engine, and median milliseconds of a run in it.

    Runs are taken in turns, so that a busy machine is busy for all.
    """
    with tempfile.TemporaryDirectory() as scratch:
        engines = {}
        for name, model in variants.items():
            folder = Path(scratch) / name
            folder.mkdir()
            onnx.save_model(model, str(folder / MODEL))
            outputs, masks = outputs_of(model)
            draft = BundleInfo(
                model=info,
                opset=next(x.version for x in model.opset_import if not x.domain),
                lowering=lowering,
                batch=len(feeds[0].images),
                outputs=outputs,
                masks=masks,
                files={},
                source=Source(path="", sha256=""),
            )
            engines[name] = open_engine(Bundle(folder, draft))
        times: dict[str, list[float]] = {name: [] for name in variants}
        for turn in progress(range(-2, _ROUNDS), "timing"):
            for name, engine in engines.items():
                start = perf_counter()
                engine.run(feeds[turn % len(feeds)])
                if turn >= 0:
                    times[name].append((perf_counter() - start) * 1e3)
    used = next(iter(engines.values())).name
    return used, {name: float(np.median(taken)) for name, taken in times.items()}


def concluded(
    comparison: PrecisionComparison, name: str, worth: float, note: str = ""
) -> PrecisionComparison:
    """A comparison with the conclusion drawn for one of its rows, which becomes the last.

    Args:
        comparison: The figures.
        name: The row of the graph that is exported.
        worth: AP a lower precision may lose and still be recommended.
        note: What else there is to say.
    """
    (exported,) = (row for row in comparison.rows if row.name == name)
    rows = [*(row for row in comparison.rows if row is not exported), exported]
    lines = ([note] if note else []) + advice(rows, worth, comparison.engine)
    return comparison.model_copy(update={"rows": tuple(rows), "advice": tuple(lines)})


def advice(rows: Sequence[PrecisionRow], worth: float, engine: str) -> list[str]:
    """What the figures say about the last row against the other precisions.

    Args:
        rows: As in :class:`engines.precision_report.PrecisionComparison`.
        worth: AP that may be lost.
        engine: As in :class:`engines.precision_report.PrecisionComparison`.
    """
    asked = rows[-1]
    others = [row for row in rows if row.precision != asked.precision]
    lines = []
    if asked.ap is not None and others[0].ap is not None and others[0].ap - asked.ap > worth:
        lines.append(
            f"do not use {asked.name}: it loses {others[0].ap - asked.ap:.4f} AP against "
            f"{others[0].name} (at most {worth:g} is worth it)"
        )
    elif asked.violations:
        lines.append(
            f"do not use {asked.name} unseen: against {others[0].name} there are "
            f"{', '.join(asked.violations)}"
        )
    lines += [
        f"{asked.name} is no smaller than {x.name}" for x in others if asked.size_mb >= x.size_mb
    ]
    fastest = min(others, key=lambda row: row.cpu_ms)
    times = f"{asked.cpu_ms:.1f} ms where {fastest.name} takes {fastest.cpu_ms:.1f}"
    if asked.cpu_ms > _GAIN * fastest.cpu_ms:
        lines.append(f"do not use {asked.name} on this CPU in {engine}: {times}")
    else:
        lines.append(f"{asked.name} pays on this CPU in {engine}: {times}")
    lines.append(
        "CPU times say nothing about a GPU, where half precision and int8 have units of their own: "
        "build an engine on the target and run `detr bench run` there"
    )
    return lines
