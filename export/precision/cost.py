"""What a precision costs and brings, measured: average precision, latency and size side by side."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter

import numpy as np
import onnx
from onnx import ModelProto
from pydantic import BaseModel

from detr.cli_support import progress
from detr.data import Dataset
from detr.data.preprocess import Inputs, preprocess
from detr.model_info import ModelInfo
from detr.types import Detections
from engines.bundle import MODEL, Bundle, BundleInfo, Source
from engines.half_emulation import half_session
from engines.msda_function import Lowering
from engines.open import engine_of
from export.parity.budget import default_budget
from export.parity.engines import average_precision, outcome
from export.parity.samples import Samples
from export.precision.ranges import fill
from export.precision.trial import detections

_MOST_IMAGES = 500
_ROUNDS = 20
# Less than this share of the time is a gain; anything closer is the machine's mood.
_GAIN = 0.95


class Row(BaseModel):
    """One graph.

    Attributes:
        name: Its precision, and its island where there are several.
        ap: COCO AP, half precision and int8 computed as such; ``None`` without labels.
        over: What exceeds the parity budget of its precision, against float32.
        cpu_ms: Median time of a run on this CPU, engine only, one batch.
        size_mb: Size of the graph with its weights, 10^6 bytes.
    """

    name: str
    ap: float | None
    over: tuple[str, ...] = ()
    cpu_ms: float
    size_mb: float

    @property
    def precision(self) -> str:
        """The precision without its island."""
        return self.name.split()[0]


class Verdict(BaseModel):
    """The comparison.

    Attributes:
        images: Images the comparison is over.
        batch: Images per timed run.
        engine: What ran for the times: the fastest engine for a CPU that is installed.
        rows: float32 first; the exported graph last.
        advice: The conclusion, one line each.
    """

    images: int
    batch: int
    engine: str
    rows: tuple[Row, ...]
    advice: tuple[str, ...]

    def keep(self, name: str, worth: float, note: str = "") -> Verdict:
        """The same with the conclusion drawn for one of the rows, which becomes the last.

        Args:
            name: The row of the graph that is exported.
            worth: AP a lower precision may lose and still be recommended.
            note: What else there is to say.
        """
        (kept,) = (row for row in self.rows if row.name == name)
        rows = [*(row for row in self.rows if row is not kept), kept]
        told = ([note] if note else []) + advice(rows, worth, self.engine)
        return self.model_copy(update={"rows": tuple(rows), "advice": tuple(told)})

    def over(self, name: str) -> tuple[str, ...]:
        """What of a row exceeds its budget."""
        return next(row.over for row in self.rows if row.name == name)

    def table(self) -> str:
        """For a person."""
        first = self.rows[0]
        width = max(len(row.name) for row in self.rows)
        lines = [
            f"{'':<{width}}      AP  against fp32  budget    CPU ms     MB  ({self.images} images, "
            f"times in {self.engine})"
        ]
        for row in self.rows:
            ap, gap = "     –", "      –"
            if row.ap is not None and first.ap is not None:
                ap, gap = f"{row.ap:.4f}", f"{row.ap - first.ap:+.4f}"
            held = "over  " if row.over else "holds "
            lines.append(
                f"{row.name:<{width}}  {ap}       {gap}  {held}  {row.cpu_ms:8.1f}  "
                f"{row.size_mb:5.1f}"
            )
        return "\n".join([*lines, *self.advice])


def measure(
    variants: Mapping[str, ModelProto],
    info: ModelInfo,
    dataset: Dataset,
    batch: int,
    lowering: Lowering,
) -> Verdict:
    """Measures graphs of the same weights, each against the first and its precision's budget.

    Args:
        variants: Graphs by name; float32 first.
        info: What the model is.
        dataset: At most 500 of its images are used, spread evenly; AP is measured where they have
            labels.
        batch: Images per run.
        lowering: Body of their attention function.
    """
    samples = Samples.of_dataset(dataset, _MOST_IMAGES)
    exact = {name: half_session(model) for name, model in variants.items()}
    found: dict[str, list[Detections]] = {name: [] for name in variants}
    feeds: list[Inputs] = []
    for start in progress(range(0, len(samples), batch), "measuring precision"):
        count = min(batch, len(samples) - start)
        images = [samples.image(start + k) for k in range(count)]
        feed = preprocess(fill(images, batch), info.preprocess)
        feeds = [*feeds, feed][:_ROUNDS]
        for name, session in exact.items():
            found[name] += detections(session, vars(feed))[: len(images)]
    engine, times = _times(variants, info, feeds, lowering)
    expected = next(iter(found.values()))
    reference_ap, _ = average_precision(samples, expected)
    rows = []
    for name, model in variants.items():
        budget = default_budget(name.split()[0])
        result = outcome(samples, expected, found[name], reference_ap, budget)
        rows.append(
            Row(
                name=name,
                ap=result.ap,
                over=tuple(result.over(budget)),
                cpu_ms=times[name],
                size_mb=model.ByteSize() / 1e6,
            )
        )
    return Verdict(images=len(samples), batch=batch, engine=engine, rows=tuple(rows), advice=())


def _times(
    variants: Mapping[str, ModelProto],
    info: ModelInfo,
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
            draft = BundleInfo(
                model=info,
                opset=next(x.version for x in model.opset_import if not x.domain),
                lowering=lowering,
                batch=len(feeds[0].images),
                files={},
                source=Source(path="", sha256=""),
            )
            engines[name] = engine_of(Bundle(folder, draft))
        times: dict[str, list[float]] = {name: [] for name in variants}
        for turn in progress(range(-2, _ROUNDS), "timing"):
            for name, engine in engines.items():
                start = perf_counter()
                engine.run(feeds[turn % len(feeds)])
                if turn >= 0:
                    times[name].append((perf_counter() - start) * 1e3)
    used = next(iter(engines.values())).name
    return used, {name: float(np.median(taken)) for name, taken in times.items()}


def advice(rows: Sequence[Row], worth: float, engine: str) -> list[str]:
    """What the figures say about the last row against the other precisions.

    Args:
        rows: As in :class:`Verdict`.
        worth: AP that may be lost.
        engine: As in :class:`Verdict`.
    """
    asked = rows[-1]
    others = [row for row in rows if row.precision != asked.precision]
    lines = []
    if asked.ap is not None and others[0].ap is not None and others[0].ap - asked.ap > worth:
        lines.append(
            f"do not use {asked.name}: it loses {others[0].ap - asked.ap:.4f} AP against "
            f"{others[0].name} (at most {worth:g} is worth it)"
        )
    elif asked.over:
        lines.append(
            f"do not use {asked.name} unseen: against {others[0].name} there are "
            f"{', '.join(asked.over)}"
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
