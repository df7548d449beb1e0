"""The untouched file as an engine: what an adopted bundle has to reproduce."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from detr.data.preprocess import Inputs
from detr.model_info import AdoptedInfo
from engines.base import Engine, RawDetections
from engines.ort_engine import open_session
from export.adopt.contract import QueryOutputs, Reading, ReadyOutputs, ScoredRows, Signature


class OriginalEngine(Engine):
    """Someone's ONNX file in ONNX Runtime; what the bundle does in its graph is done in numpy.

    Args:
        path: The file.
        info: What the bundle says of it.
        known: What the file takes and gives.
        read: How its outputs are read.
    """

    name = "original"

    def __init__(self, path: Path, info: AdoptedInfo, known: Signature, read: Reading) -> None:
        self.info, self.artifact, self._known, self._read = info, path, known, read
        self.versions = {"onnxruntime": ort.__version__}
        self.batch_size = 1
        self._session = open_session(path)

    def _infer(self, inputs: Inputs) -> RawDetections:
        known, read = self._known, self._read
        height, width = inputs.images.shape[2:]
        feed: dict[str, Any] = {known.image: inputs.images}
        if known.size is not None:
            feed[known.size] = np.array([[width, height]], np.int64)
        given = known.outputs
        names = [getattr(given, field.name) for field in fields(given)]
        found = [x[0] for x in self._session.run(names, feed)]
        scale = np.array([width, height] * 2, np.float32)
        if isinstance(given, QueryOutputs):
            logits, boxes = found
            query, scores, labels = _best(logits, read)
            pixels = _corners(boxes[query]) * scale
        elif isinstance(given, ScoredRows):
            order, scores = _largest(found[0][:, 4:], read.detections)
            query, labels = np.divmod(order, read.classes)
            pixels = _corners(found[0][query, :4]) * scale
        else:
            if isinstance(given, ReadyOutputs):
                pixels, scores, labels = found
            else:
                pixels, (scores, labels) = _corners(found[0][:, :4]) * scale, found[0].T[4:]
            order, scores = _largest(scores, read.detections)
            pixels, labels = pixels[order], labels[order]
        original = inputs.original_sizes[0][[1, 0, 1, 0]]
        pixels = pixels * (original / inputs.valid_sizes[0][[1, 0, 1, 0]])
        pixels = np.clip(pixels, 0, original).astype(np.float32)
        return RawDetections(pixels[None], scores[None], labels[None].astype(np.int64))


def _corners(boxes: Any) -> Any:
    """Cxcywh as x0 y0 x1 y1."""
    center, half = boxes[:, :2], boxes[:, 2:] / 2
    return np.concatenate([center - half, center + half], axis=1)


def _largest(scores: Any, count: int) -> tuple[Any, Any]:
    """Places and values of the largest, the first of equal ones first."""
    flat = scores.reshape(-1)
    order = np.argsort(-flat, kind="stable")[:count]
    return order, flat[order]


def _best(logits: Any, read: Reading) -> tuple[Any, Any, Any]:
    """Queries, scores and labels of the best."""
    if read.scores == "sigmoid":
        order, best = _largest(logits, read.detections)
        query, labels = np.divmod(order, read.classes)
        return query, 1 / (1 + np.exp(-best)), labels
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares = (shares / shares.sum(axis=1, keepdims=True))[:, : read.classes]
    most, labels = shares.max(axis=1), shares.argmax(axis=1)
    order, best = _largest(most, read.detections)
    return order, best, labels[order]
