"""Changing an exported graph by hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper


def constant(graph: GraphProto, name: str, value: npt.ArrayLike, kind: type = np.float32) -> str:
    graph.initializer.append(numpy_helper.from_array(np.asarray(value, kind), name))
    return name


def insert_behind(graph: GraphProto, value: str, *nodes: NodeProto) -> None:
    """All readers of ``value`` read the last output of ``nodes`` instead, which may read it."""
    new = nodes[-1].output[0]
    own = {id(node) for node in nodes}
    for node in graph.node:
        if id(node) not in own:
            node.input[:] = [new if name == value else name for name in node.input]
    at = [i + 1 for i, node in enumerate(graph.node) if value in node.output]
    for offset, node in enumerate(nodes):
        graph.node.insert((at or [0])[0] + offset, node)


def replace_output(graph: GraphProto, output: str, *nodes: NodeProto) -> None:
    """``nodes`` compute a graph output from what used to be it, now called ``OUTPUT_before``."""
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [f"{output}_before" if name == output else name for name in names]
    graph.node.extend(nodes)


def attribute(node: NodeProto, name: str, value: Any) -> None:
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


def samplers(model: ModelProto) -> Iterator[NodeProto]:
    for function in model.functions:
        yield from (node for node in function.node if node.op_type == "GridSample")


def in_module(model: ModelProto, module: str, op_type: str) -> NodeProto:
    nodes: Iterator[NodeProto] = (
        node
        for node in model.graph.node
        if node.op_type == op_type and node.name.rpartition("/")[0] == module
    )
    return next(nodes)


def weight(model: ModelProto, *endings: str) -> TensorProto:
    tensors: Iterator[TensorProto] = iter(model.graph.initializer)
    return next(t for t in tensors if t.name.endswith(endings))
