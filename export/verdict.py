"""What a precision costs and brings, measured: average precision, latency and size side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import ModelProto
from pydantic import BaseModel

from detr.cli_support import progress
from detr.data import Dataset
from detr.data.preprocess import preprocess
from detr.model_info import ModelInfo
from detr.types import Detections
from engines.bundle import OUTPUTS
from engines.half_emulation import half_session
from engines.ort_engine import session_options
from export.budget import default_budget
from export.judge import detections
from export.judgement import average_precision, outcome
from export.ranges import fill
from export.samples import Samples

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
        cpu_ms: Median time of a run in ONNX Runtime on this CPU, engine only, one batch.
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
        rows: float32 first; the exported graph last.
        advice: The conclusion, one line each.
    """

    images: int
    batch: int
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
        told = ([note] if note else []) + advice(rows, worth)
        return self.model_copy(update={"rows": tuple(rows), "advice": tuple(told)})

    def over(self, name: str) -> tuple[str, ...]:
        """What of a row exceeds its budget."""
        return next(row.over for row in self.rows if row.name == name)

    def table(self) -> str:
        """For a person."""
        first = self.rows[0]
        width = max(len(row.name) for row in self.rows)
        lines = [
            f"{'':<{width}}      AP  against fp32  budget    CPU ms     MB  ({self.images} images)"
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
    variants: Mapping[str, ModelProto], info: ModelInfo, dataset: Dataset, batch: int
) -> Verdict:
    """Measures graphs of the same weights, each against the first and its precision's budget.

    Args:
        variants: Graphs by name; float32 first.
        info: What the model is.
        dataset: At most 500 of its images are used, spread evenly; AP is measured where they have
            labels.
        batch: Images per run.
    """
    samples = Samples.of_dataset(dataset, _MOST_IMAGES)
    exact = {name: half_session(model) for name, model in variants.items()}
    found: dict[str, list[Detections]] = {name: [] for name in variants}
    feeds: list[dict[str, Any]] = []
    for start in progress(range(0, len(samples), batch), "measuring precision"):
        count = min(batch, len(samples) - start)
        images = [samples.image(start + k) for k in range(count)]
        feed = vars(preprocess(fill(images, batch), info.preprocess))
        feeds = [*feeds, feed][:_ROUNDS]
        for name, session in exact.items():
            found[name] += detections(session, feed)[: len(images)]
    times = _times(variants, feeds)
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
    return Verdict(images=len(samples), batch=batch, rows=tuple(rows), advice=())


def _times(variants: Mapping[str, ModelProto], feeds: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Median milliseconds of a run, taken in turns so that a busy machine is busy for all."""
    sessions = {
        name: ort.InferenceSession(
            model.SerializeToString(), session_options(None), providers=["CPUExecutionProvider"]
        )
        for name, model in variants.items()
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in progress(range(-2, _ROUNDS), "timing"):
        for name, session in sessions.items():
            start = perf_counter()
            session.run(list(OUTPUTS), feeds[turn % len(feeds)])
            if turn >= 0:
                times[name].append((perf_counter() - start) * 1e3)
    return {name: float(np.median(taken)) for name, taken in times.items()}


def advice(rows: Sequence[Row], worth: float) -> list[str]:
    """What the figures say about the last row against the other precisions.

    Args:
        rows: As in :class:`Verdict`.
        worth: AP that may be lost.
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
    if asked.cpu_ms > _GAIN * fastest.cpu_ms:
        lines.append(
            f"do not use {asked.name} on this CPU in ONNX Runtime: {asked.cpu_ms:.1f} ms is no "
            f"gain on {fastest.name}'s {fastest.cpu_ms:.1f} ms"
        )
    lines.append(
        "CPU times say nothing about a GPU, where half precision and int8 have units of their own: "
        "build an engine on the target and run `detr bench run` there"
    )
    return lines
