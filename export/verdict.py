"""What a precision costs and brings, measured: average precision, latency and size side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import ModelProto
from pydantic import BaseModel

from bench.coco_ap import evaluate
from bench.run import spread
from detr.cli_support import progress
from detr.data import Dataset
from detr.data.coco_format import coco_ground_truth
from detr.data.preprocess import preprocess
from detr.model_info import ModelInfo
from detr.types import Detections
from engines.bundle import OUTPUTS
from engines.half_emulation import half_session
from engines.ort_engine import session_options
from export.judge import detections
from export.ranges import fill

_MOST_IMAGES = 500
_ROUNDS = 20
# Less than this share of the time is a gain; anything closer is the machine's mood.
_GAIN = 0.95


class Row(BaseModel):
    """One graph.

    Attributes:
        name: Its precision, and its island where there are several.
        ap: COCO AP, half precision and int8 computed as such.
        cpu_ms: Median time of a run in ONNX Runtime on this CPU, engine only, one batch.
        size_mb: Size of the graph with its weights, 10^6 bytes.
    """

    name: str
    ap: float
    cpu_ms: float
    size_mb: float

    @property
    def precision(self) -> str:
        """The precision without its island."""
        return self.name.split()[0]


class Verdict(BaseModel):
    """The comparison.

    Attributes:
        images: Images the average precision is over.
        batch: Images per timed run.
        rows: float32 first; the exported graph last.
        advice: The conclusion, one line each.
    """

    images: int
    batch: int
    rows: tuple[Row, ...]
    advice: tuple[str, ...]

    def changed(self) -> float:
        """By how much the last graph's AP differs from the first's."""
        return abs(self.rows[-1].ap - self.rows[0].ap)

    def table(self) -> str:
        """For a person."""
        first = self.rows[0]
        width = max(len(row.name) for row in self.rows)
        lines = [f"{'':<{width}}      AP  against fp32    CPU ms     MB  ({self.images} images)"]
        lines += [
            f"{row.name:<{width}}  {row.ap:.4f}       {row.ap - first.ap:+.4f}  {row.cpu_ms:8.1f}"
            f"  {row.size_mb:5.1f}"
            for row in self.rows
        ]
        return "\n".join([*lines, *self.advice])


def has_labels(dataset: Dataset) -> bool:
    """Whether average precision can be measured on a data set."""
    return bool(coco_ground_truth(dataset)["annotations"])


def measure(
    variants: Mapping[str, ModelProto],
    info: ModelInfo,
    dataset: Dataset,
    batch: int,
    worth: float,
) -> Verdict:
    """Measures graphs of the same weights.

    Args:
        variants: Graphs by name; float32 first, the one in question last.
        info: What the model is.
        dataset: Images with labels; at most 500 of them are used, spread evenly.
        batch: Images per run.
        worth: AP a lower precision may lose and still be recommended.
    """
    indices = spread(len(dataset), _MOST_IMAGES)
    exact = {name: half_session(model) for name, model in variants.items()}
    found: dict[str, list[Detections]] = {name: [] for name in variants}
    feeds: list[dict[str, Any]] = []
    for start in progress(range(0, len(indices), batch), "measuring AP"):
        images = [dataset.image(i) for i in indices[start : start + batch]]
        feed = vars(preprocess(fill(images, batch), info.preprocess))
        feeds = [*feeds, feed][:_ROUNDS]
        for name, session in exact.items():
            found[name] += detections(session, feed)[: len(images)]
    times = _times(variants, feeds)
    rows = [
        Row(
            name=name,
            ap=evaluate(dataset, found[name], indices).ap,
            cpu_ms=times[name],
            size_mb=model.ByteSize() / 1e6,
        )
        for name, model in variants.items()
    ]
    return Verdict(
        images=len(indices), batch=batch, rows=tuple(rows), advice=tuple(advice(rows, worth))
    )


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
    lost = others[0].ap - asked.ap
    if lost > worth:
        lines.append(
            f"do not use {asked.name}: it loses {lost:.4f} AP against {others[0].name} "
            f"(at most {worth:g} is worth it)"
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
