"""Mistakes with masks, for bundles that have some; see :mod:`tools.gate_faults`.

Boxes, scores and labels stay right in every one of them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import GraphProto, ModelProto, helper

from tools.gate_faults import Change, Fault
from tools.graph_edits import constant, replace_output

_Order = Callable[[int], "np.ndarray[tuple[int], np.dtype[np.int64]]"]


def _shape(graph: GraphProto) -> list[int]:
    """Detections, height and width of the output."""
    (output,) = (value for value in graph.output if value.name == "masks")
    return [dim.dim_value for dim in output.type.tensor_type.shape.dim[1:]]


def _reordered(axis: int, order: _Order) -> Change:
    """Masks with one axis in another order."""

    def change(model: ModelProto) -> None:
        graph = model.graph
        indices = constant(graph, "other_order", order(_shape(graph)[axis - 1]), np.int64)
        replace_output(
            graph,
            "masks",
            helper.make_node("Gather", ["masks_before", indices], ["masks"], axis=axis),
        )

    return change


def _by(operator: str) -> Change:
    def change(model: ModelProto) -> None:
        replace_output(
            model.graph, "masks", helper.make_node(operator, ["masks_before"], ["masks"])
        )

    return change


def _transposed(model: ModelProto) -> None:
    """Columns are read as rows."""
    shape = constant(model.graph, "as_before", [0, *_shape(model.graph)], np.int64)
    replace_output(
        model.graph,
        "masks",
        helper.make_node("Transpose", ["masks_before"], ["masks_turned"], perm=[0, 1, 3, 2]),
        helper.make_node("Reshape", ["masks_turned", shape], ["masks"]),
    )


MASK_FAULTS = {
    "masks of the next detection": Fault(_reordered(1, lambda n: np.roll(np.arange(n), 1))),
    "masks a cell to the right": Fault(
        _reordered(3, lambda n: np.maximum(np.arange(n) - 1, 0)),
    ),
    "masks upside down": Fault(_reordered(2, lambda n: np.arange(n)[::-1])),
    "rows and columns of masks swapped": Fault(_transposed),
    "sign of masks": Fault(_by("Neg")),
    "probabilities for logits of masks": Fault(_by("Sigmoid")),
    "another threshold of masks": Fault(masks={"threshold": 0.6}),
    "another stride of masks": Fault(masks={"stride": 8}),
    "masks cut to their boxes": Fault(masks={"margin": 0.0}),
}
