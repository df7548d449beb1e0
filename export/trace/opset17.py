"""Operator set 18 to 17: torch's exporter speaks 18 and newer, some targets stop at 17.

onnx's own converter refuses reductions whose axes are an initializer, which is how torch writes
them, so the few operators that changed in 18 are written out here. An operator set 18 operator that
is not on the list is an error and never passed through.
"""

from __future__ import annotations

from typing import Any

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, helper, numpy_helper

# Operators whose axes moved from an attribute to an input in opset 18.
_REDUCTIONS = {
    f"Reduce{kind}"
    for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
}
# Changed in 18 only by new types or by new attributes; these and what they say where they are
# absent, which is what opset 17 does.
_COMPATIBLE = {"Pad", "Resize", "ScatterElements", "ScatterND"}
_NEW_ATTRIBUTES: dict[str, dict[str, Any]] = {
    "Resize": {"antialias": 0, "axes": None, "keep_aspect_ratio_policy": b"stretch"}
}


def lower_to_17(model: ModelProto) -> None:
    """Rewrites a model of opset 18 as opset 17, in place.

    Raises:
        ValueError: An operator whose opset 18 meaning cannot be told in opset 17.
    """
    entry = next(entry for entry in model.opset_import if entry.domain == "")
    if entry.version != 18:
        raise ValueError(f"opset {entry.version}: only 18 can be lowered")
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.domain == "":
            _lower_node(node, constants, model.graph)
    entry.version = 17
    _drop_unused(model.graph)


def _lower_node(node: NodeProto, constants: dict[str, onnx.TensorProto], graph: GraphProto) -> None:
    if node.op_type in _REDUCTIONS:
        _axes_to_attribute(node, constants)
    elif node.op_type == "Split":
        _split_to_sizes(node, graph)
    elif onnx.defs.get_schema(node.op_type, 18).since_version == 18:
        usual = _NEW_ATTRIBUTES.get(node.op_type, {})
        given = {a.name: helper.get_attribute_value(a) for a in node.attribute if a.name in usual}
        clash = any(value != usual[name] for name, value in given.items())
        for name in given:
            _remove_attribute(node, name)
        if node.op_type not in _COMPATIBLE or clash or (node.op_type == "Pad" and _has(node, 3)):
            raise ValueError(f"{node.op_type} ({node.name}) has no equal in opset 17")


def _has(node: NodeProto, position: int) -> bool:
    return len(node.input) > position and bool(node.input[position])


def _axes_to_attribute(node: NodeProto, constants: dict[str, onnx.TensorProto]) -> None:
    if _has(node, 1):
        if node.input[1] not in constants:
            raise ValueError(f"{node.op_type} ({node.name}): its axes are computed")
        axes = numpy_helper.to_array(constants[node.input[1]])
        node.attribute.append(helper.make_attribute("axes", [int(axis) for axis in axes]))
    elif any(a.name == "noop_with_empty_axes" and a.i for a in node.attribute):
        raise ValueError(f"{node.op_type} ({node.name}) reduces nothing")
    del node.input[1:]
    _remove_attribute(node, "noop_with_empty_axes")


def _split_to_sizes(node: NodeProto, graph: GraphProto) -> None:
    """Equal parts without ``num_outputs`` are what opset 17 does when no sizes are given."""
    parts = next((a.i for a in node.attribute if a.name == "num_outputs"), None)
    if parts is None:
        return
    shapes = {
        info.name: [dim.dim_value for dim in info.type.tensor_type.shape.dim]
        for info in [*graph.value_info, *graph.input]
    }
    axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
    shape = shapes.get(node.input[0])
    if shape is None or not shape[axis] or shape[axis] % parts:
        raise ValueError(f"Split ({node.name}) into {parts} parts that may not be equal")
    _remove_attribute(node, "num_outputs")


def _remove_attribute(node: NodeProto, name: str) -> None:
    kept: list[AttributeProto] = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)


def _drop_unused(graph: GraphProto) -> None:
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
