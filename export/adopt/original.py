"""The untouched file as an engine: what an adopted bundle has to reproduce."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from detr.data.preprocess import Inputs
from detr.model_info import AdoptedInfo
from engines.base import Engine, RawDetections
from engines.ort_engine import open_session
from export.adopt.contract import QueryOutputs, Reading, Signature


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
        if isinstance(known.outputs, QueryOutputs):
            wanted = [known.outputs.logits, known.outputs.boxes]
            logits, boxes = (x[0] for x in self._session.run(wanted, feed))
            query, scores, labels = _best(logits, read)
            center, half = boxes[query, :2], boxes[query, 2:] / 2
            pixels = np.concatenate([center - half, center + half], axis=1)
            pixels = pixels * np.array([width, height] * 2, np.float32)
        else:
            outputs = known.outputs
            wanted = [outputs.boxes, outputs.scores, outputs.labels]
            boxes, scores, labels = (x[0] for x in self._session.run(wanted, feed))
            order = np.argsort(-scores, kind="stable")[: read.detections]
            pixels, scores, labels = boxes[order], scores[order], labels[order]
        original = inputs.original_sizes[0][[1, 0, 1, 0]]
        pixels = pixels * (original / inputs.valid_sizes[0][[1, 0, 1, 0]])
        pixels = np.clip(pixels, 0, original).astype(np.float32)
        return RawDetections(pixels[None], scores[None], labels[None].astype(np.int64))


def _best(logits: Any, read: Reading) -> tuple[Any, Any, Any]:
    """Queries, scores and labels of the best."""
    if read.scores == "sigmoid":
        flat = logits.reshape(-1)
        order = np.argsort(-flat, kind="stable")[: read.detections]
        query, labels = np.divmod(order, read.classes)
        return query, 1 / (1 + np.exp(-flat[order])), labels
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares = (shares / shares.sum(axis=1, keepdims=True))[:, : read.classes]
    most, labels = shares.max(axis=1), shares.argmax(axis=1)
    order = np.argsort(-most, kind="stable")[: read.detections]
    return order, most[order], labels[order]
