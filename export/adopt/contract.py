"""What a stranger's graph takes and gives, and the bundle's contract around it.

A bundle takes normalized images on a canvas with the size of the image within it, and gives boxes
in pixels of the original image, best first. Here a graph that takes the same images and gives
scores and boxes of queries, or ready detections, gets the rest around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, compose, helper, numpy_helper

from detr.errors import UserError
from engines.bundle import INPUTS, OUTPUTS

Scores = Literal["sigmoid", "softmax"]
_PREFIX = "adopted/"


@dataclass(frozen=True)
class QueryOutputs:
    """Class logits ``[1, Q, C]`` and boxes ``[1, Q, 4]``, cxcywh in parts of the canvas."""

    logits: str
    boxes: str


@dataclass(frozen=True)
class ReadyOutputs:
    """Detections: boxes ``[1, T, 4]`` x0 y0 x1 y1 in pixels of the canvas, scores and labels."""

    boxes: str
    scores: str
    labels: str


@dataclass(frozen=True)
class ScoredRows:
    """One output ``[1, Q, 4 + C]``: boxes, cxcywh in parts of the canvas, and class scores."""

    rows: str


@dataclass(frozen=True)
class DetectionRows:
    """One output ``[1, T, 6]``: boxes, cxcywh in parts of the canvas, score and label."""

    rows: str


Outputs = QueryOutputs | ReadyOutputs | ScoredRows | DetectionRows


@dataclass(frozen=True)
class Signature:
    """What a graph takes and gives.

    Attributes:
        image: Name of the input for images.
        size: Name of a further input for (width, height), to which ready boxes are scaled.
        outputs: What is read of its outputs; further ones are left out.
    """

    image: str
    size: str | None
    outputs: Outputs


@dataclass(frozen=True)
class Reading:
    """How query outputs become detections.

    Attributes:
        scores: Of a class: by sigmoid, or by softmax with "no object" as the last class.
        classes: How many there are.
        detections: How many are kept of an image.
    """

    scores: Scores
    classes: int
    detections: int


def signature(model: ModelProto, place: str) -> Signature:
    """Recognizes inputs and outputs, by type and rank first, by name where that is not enough.

    Raises:
        UserError: ``adopt-input`` or ``adopt-output`` for what is not recognized.
    """
    constants = {x.name for x in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    images = [v.name for v in inputs if _rank(v) == 4 and _type(v) == TensorProto.FLOAT]
    sizes = [v.name for v in inputs if _rank(v) == 2 and _type(v) == TensorProto.INT64]
    others = [v.name for v in inputs if v.name not in {*images, *sizes}]
    if len(images) != 1 or len(sizes) > 1 or others:
        raise UserError(
            "adopt-input",
            f"{place}: takes {_listed(inputs) or 'nothing'}; one float image input is known, with "
            "an int64 size input at most beside it",
        )
    outputs = list(model.graph.output)
    by_name = {value.name: value for value in outputs}
    if set(OUTPUTS) <= set(by_name):
        return Signature(images[0], next(iter(sizes), None), ReadyOutputs(*OUTPUTS))
    if sizes:
        raise UserError(
            "adopt-input", f"{place}: {sizes[0]}: known beside outputs {', '.join(OUTPUTS)} only"
        )
    joined = _joined_rows(model) if len(outputs) == 1 else None
    if joined is not None:
        return Signature(images[0], None, joined)
    rows = [v.name for v in outputs if _rank(v) == 3]
    fours = [n for n in rows if _last(by_name[n]) == 4]
    if len(fours) > 1:  # four classes
        fours = [n for n in fours if "box" in n] or fours
    logits = [n for n in rows if n not in fours]
    if len(fours) != 1 or len(logits) != 1:
        raise UserError(
            "adopt-output",
            f"{place}: gives {_listed(outputs)}; known are class logits and boxes of rank 3, "
            f"{', '.join(OUTPUTS)}, or one output of boxes and scores by sigmoid side by side; "
            "export it with these alone",
        )
    return Signature(images[0], None, QueryOutputs(logits[0], fours[0]))


# What stands between a sigmoid and an output without changing a number.
_MOVING = frozenset(
    ("Cast", "Flatten", "Gather", "GatherElements", "Identity", "Reshape", "Slice", "Squeeze")
    + ("TopK", "Transpose", "Unsqueeze")
)


def _joined_rows(model: ModelProto) -> ScoredRows | DetectionRows | None:
    """Recognizes one output in which boxes and scores stand side by side (ultralytics' RT-DETR).

    Other detectors' outputs have the same shape and hold corners in pixels. Boxes that come from a
    sigmoid are parts of the image, and scores that do are scores.
    """
    made = {name: node for node in model.graph.node for name in node.output}
    name = model.graph.output[0].name
    node = made.get(name)
    axis = next((a.i for a in node.attribute if a.name == "axis"), None) if node else None
    if node is None or node.op_type != "Concat" or axis not in (-1, 2):
        return None
    origins = [_origin(made, part) for part in node.input]
    if origins[:2] != ["Sigmoid", "Sigmoid"]:
        return None
    if len(origins) == 2:
        return ScoredRows(name)
    numbers = made.get(node.input[2])
    while numbers is not None and numbers.op_type in ("Unsqueeze", "Reshape"):
        numbers = made.get(numbers.input[0])
    cast = numbers is not None and numbers.op_type == "Cast"
    return DetectionRows(name) if len(origins) == 3 and cast else None


def _origin(made: dict[str, NodeProto], name: str) -> str | None:
    """The operator that computes a value, behind those that only move it."""
    while (node := made.get(name)) is not None and (
        # A stack of one, as of the one layer that is evaluated.
        node.op_type in _MOVING or (node.op_type == "Concat" and len(node.input) == 1)
    ):
        name = node.input[0]
    return None if node is None else node.op_type


def reading(
    outputs: int,
    queries: int,
    classes: int,
    scores: Scores | None,
    detections: int | None,
    place: str,
) -> Reading:
    """How query outputs are to be read.

    Args:
        outputs: C.
        queries: Q.
        classes: Number of names given: C, or one less.
        scores: What the user says.
        detections: What the user says.
        place: The file, for messages.

    Raises:
        UserError: ``adopt-scores`` where the names do not say which of two readings is meant, or
            say another one than the user.
    """
    fitting: dict[int, Scores] = {outputs: "sigmoid", outputs - 1: "softmax"}
    if scores is None and classes == outputs - 1:
        raise UserError(
            "adopt-scores",
            f"{place}: has {outputs} class outputs for {classes} names: say --scores softmax where "
            "the last is 'no object', or name it where it is a class like others",
        )
    if scores is not None and scores != fitting[classes]:
        raise UserError(
            "adopt-scores",
            f"{place}: --scores {scores} and {classes} class names do not go with {outputs} class "
            "outputs",
        )
    most = queries * classes if fitting[classes] == "sigmoid" else queries
    return Reading(fitting[classes], classes, min(detections or queries, most))


class _Post:
    """Collects nodes behind the stranger's."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []

    def op(self, op_type: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        count = len(self.nodes)
        names = [f"detections/{op_type}_{count}_{i}" for i in range(outputs)]
        node = helper.make_node(
            op_type, inputs, names, name=f"detections/{op_type}_{count}", **attributes
        )
        self.nodes.append(node)
        return names[0] if outputs == 1 else names

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        found: str = self.op("Constant", value=numpy_helper.from_array(np.asarray(value, dtype)))
        return found

    def give(self, name: str, output: str) -> None:
        self.nodes.append(
            helper.make_node("Identity", [name], [output], name=f"detections/{output}")
        )


def wrapped(
    model: ModelProto, known: Signature, read: Reading, canvas: tuple[int, int]
) -> ModelProto:
    """The graph with the bundle's inputs and outputs.

    Args:
        model: Static, of one image.
        known: What it takes and gives.
        read: How its outputs are read.
        canvas: (height, width) of its images.
    """
    inner = compose.add_prefix(model, _PREFIX, rename_nodes=False)
    graph, post = inner.graph, _Post()
    before = [helper.make_node("Identity", ["images"], [_PREFIX + known.image], name="images")]
    height, width = canvas
    if known.size is not None:
        size = numpy_helper.from_array(np.array([[width, height]], np.int64))
        before.append(helper.make_node("Constant", [], [_PREFIX + known.size], value=size))
    picked = _picked(post, known.outputs, read, canvas)
    boxes, scores, labels = picked
    # (height, width) twice, as (x, y, x, y): from the canvas to the image it was fitted from.
    order = post.constant([1, 0, 1, 0], np.int64)
    limits = post.op("Gather", "original_sizes", order, axis=1)
    scale = post.op("Div", limits, post.op("Gather", "valid_sizes", order, axis=1))
    as_row = post.constant([1, 1, 4], np.int64)
    boxes = post.op("Mul", boxes, post.op("Reshape", scale, as_row))
    boxes = post.op("Max", boxes, post.constant(0.0))
    boxes = post.op("Min", boxes, post.op("Reshape", limits, as_row))
    for name, output in zip((boxes, scores, labels), OUTPUTS, strict=True):
        post.give(name, output)
    nodes = [*before, *graph.node, *post.nodes]
    del graph.node[:], graph.input[:], graph.output[:]
    graph.node.extend(nodes)
    count, number = read.detections, TensorProto.FLOAT
    graph.input.extend(
        helper.make_tensor_value_info(name, number, shape)
        for name, shape in zip(INPUTS, ([1, 3, height, width], [1, 2], [1, 2]), strict=True)
    )
    graph.output.extend(
        [
            helper.make_tensor_value_info("boxes", number, [1, count, 4]),
            helper.make_tensor_value_info("scores", number, [1, count]),
            helper.make_tensor_value_info("labels", TensorProto.INT64, [1, count]),
        ]
    )
    return inner


def _picked(
    post: _Post, given: Outputs, read: Reading, canvas: tuple[int, int]
) -> tuple[str, str, str]:
    """Boxes in pixels of the canvas, scores and labels of the best detections."""
    if isinstance(given, ReadyOutputs):
        boxes, scores, labels = (_PREFIX + x for x in (given.boxes, given.scores, given.labels))
        return _best_detections(post, boxes, scores, labels, read)
    if isinstance(given, DetectionRows):
        columns = post.constant([4, 1, 1], np.int64)
        boxes, *rest = post.op("Split", _PREFIX + given.rows, columns, outputs=3, axis=2)
        scores, labels = (post.op("Flatten", x) for x in rest)
        return _best_detections(post, _corners(post, boxes, canvas), scores, labels, read)
    if isinstance(given, ScoredRows):
        columns = post.constant([4, read.classes], np.int64)
        boxes, scores = post.op("Split", _PREFIX + given.rows, columns, outputs=2, axis=2)
        return _best_queries(post, scores, boxes, read, canvas, scored=True)
    return _best_queries(post, _PREFIX + given.logits, _PREFIX + given.boxes, read, canvas)


def _best_queries(
    post: _Post,
    logits: str,
    boxes: str,
    read: Reading,
    canvas: tuple[int, int],
    scored: bool = False,
) -> tuple[str, str, str]:
    """Of queries; the logits may have become scores."""
    count = post.constant([read.detections], np.int64)
    if read.scores == "sigmoid":
        flat = post.op("Flatten", logits, axis=1)
        best, index = post.op("TopK", flat, count, outputs=2, axis=1)
        scores = best if scored else post.op("Sigmoid", best)
        classes = post.constant(read.classes, np.int64)
        labels, query = post.op("Mod", index, classes), post.op("Div", index, classes)
    else:
        shares = post.op("Softmax", logits, axis=2)
        first, last = post.constant([0], np.int64), post.constant([read.classes], np.int64)
        shares = post.op("Slice", shares, first, last, post.constant([2], np.int64))
        # TopK and not ArgMax: TensorRT's parser knows both, but no index beside a reduction.
        one = post.constant([1], np.int64)
        most, label = post.op("TopK", shares, one, outputs=2, axis=2)
        scores, query = post.op("TopK", post.op("Flatten", most), count, outputs=2, axis=1)
        labels = post.op("GatherElements", post.op("Flatten", label), query, axis=1)
    rows = post.op("Reshape", boxes, post.constant([-1, 4], np.int64))
    picked = post.op("Gather", rows, query, axis=0)  # [1, T, 4]
    return _corners(post, picked, canvas), scores, labels


def _corners(post: _Post, boxes: str, canvas: tuple[int, int]) -> str:
    """``[1, T, 4]`` cxcywh in parts of the canvas as x0 y0 x1 y1 in its pixels."""
    height, width = canvas
    center, extent = post.op("Split", boxes, post.constant([2, 2], np.int64), outputs=2, axis=2)
    half = post.op("Mul", extent, post.constant(0.5))
    corners = post.op("Concat", post.op("Sub", center, half), post.op("Add", center, half), axis=2)
    pixels: str = post.op("Mul", corners, post.constant([[[width, height, width, height]]]))
    return pixels


def _best_detections(
    post: _Post, boxes: str, scores: str, labels: str, read: Reading
) -> tuple[str, str, str]:
    """Of ready detections."""
    count = post.constant([read.detections], np.int64)
    best, index = post.op("TopK", scores, count, outputs=2, axis=1)
    labels = post.op("Cast", labels, to=TensorProto.INT64)
    labels = post.op("GatherElements", labels, index, axis=1)
    rows = post.op("Reshape", boxes, post.constant([-1, 4], np.int64))
    return post.op("Gather", rows, index, axis=0), best, labels


def _rank(value: ValueInfoProto) -> int:
    return len(value.type.tensor_type.shape.dim)


def _last(value: ValueInfoProto) -> int:
    sizes = value.type.tensor_type.shape.dim
    return int(sizes[-1].dim_value) if sizes else 0


def _type(value: ValueInfoProto) -> int:
    return int(value.type.tensor_type.elem_type)


def _listed(values: Sequence[ValueInfoProto]) -> str:
    def text(value: ValueInfoProto) -> str:
        sizes = value.type.tensor_type.shape.dim
        shape = ", ".join(str(d.dim_value) if d.HasField("dim_value") else "?" for d in sizes)
        return f"{value.name} {TensorProto.DataType.Name(_type(value)).lower()} [{shape}]"

    return ", ".join(map(text, values))
