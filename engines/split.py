"""Cutting a graph at its deformable attentions, so that each can run in a kernel of ours.

ONNX Runtime can only be given an operator through a library built against its C header, which no
wheel carries, or through Python callbacks that copy every tensor. A graph cut at the nodes needs
neither: the pieces are ordinary models, and what crosses a cut is a handful of arrays.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx
from onnx import ModelProto, NodeProto, ValueInfoProto, helper

from engines.msda_function import DOMAIN, is_attention, node_points, node_shapes


@dataclass(frozen=True)
class Attention:
    """One attention node.

    Attributes:
        value, locations, weights: Names of its inputs.
        output: Name of its output.
        shapes: (height, width) of the levels.
        points: Number of points of each level where they are unequal.
    """

    value: str
    locations: str
    weights: str
    output: str
    shapes: tuple[tuple[int, int], ...]
    points: tuple[int, ...] | None


@dataclass(frozen=True)
class Segment:
    """What lies between two attentions, as a model of its own.

    Attributes:
        model: The nodes with their weights.
        inputs, outputs: Names of what crosses the cuts.
    """

    model: ModelProto
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def split(model: ModelProto) -> list[tuple[Segment, Attention | None]]:
    """Cuts a model into segments, each followed by an attention, the last by nothing.

    A node goes into the first segment that needs its result, so that as little as possible has to
    be kept across a cut.

    Args:
        model: A model whose attentions call ``detr::MSDeformAttn``; left as it is.
    """
    types = _types(model)
    producers = {name: node for node in model.graph.node for name in node.output}
    order = {id(node): i for i, node in enumerate(model.graph.node)}
    attentions = [node for node in model.graph.node if is_attention(node)]
    outputs = [output.name for output in model.graph.output]

    done: set[int] = {id(node) for node in attentions}
    groups: list[list[NodeProto]] = []
    for wanted in [list(node.input) for node in attentions] + [outputs]:
        nodes = _ancestors(wanted, producers, done)
        done |= {id(node) for node in nodes}
        groups.append(sorted(nodes, key=lambda node: order[id(node)]))

    # What somebody other than the segment itself asks for.
    wanted_by = [
        _read(nodes) | (set(attention.input) if attention else set(outputs))
        for nodes, attention in zip(groups, [*attentions, None], strict=True)
    ]
    result: list[tuple[Segment, Attention | None]] = []
    for i, nodes in enumerate(groups):
        attention = attentions[i] if i < len(attentions) else None
        own = set(attention.input) if attention else set(outputs)
        later = own.union(*wanted_by[i + 1 :])
        made = [name for node in nodes for name in node.output if name in later]
        result.append(
            (_segment(model, nodes, made, types), _attention(attention) if attention else None)
        )
    return result


def last_uses(parts: list[tuple[Segment, Attention | None]]) -> list[list[str]]:
    """For each part, the names nothing after it asks for; the model's outputs are never among them.

    Args:
        parts: What :func:`split` returned.
    """
    needed = set(parts[-1][0].outputs)
    result: list[list[str]] = []
    for segment, attention in reversed(parts):
        present = {*segment.inputs, *segment.outputs}
        if attention is not None:
            present |= {attention.value, attention.locations, attention.weights, attention.output}
        result.append(sorted(present - needed))
        needed |= present
    return result[::-1]


def _attention(node: NodeProto) -> Attention:
    value, locations, weights = node.input
    return Attention(
        value, locations, weights, node.output[0], node_shapes(node), node_points(node)
    )


def _ancestors(
    names: list[str], producers: dict[str, NodeProto], done: set[int]
) -> list[NodeProto]:
    """The nodes not yet done that the named values are computed from."""
    found: dict[int, NodeProto] = {}
    stack = list(names)
    while stack:
        node = producers.get(stack.pop())
        if node is not None and id(node) not in done and id(node) not in found:
            found[id(node)] = node
            stack.extend(node.input)
    return list(found.values())


def _read(nodes: list[NodeProto]) -> set[str]:
    return {name for node in nodes for name in node.input if name}


def _segment(
    model: ModelProto, nodes: list[NodeProto], outputs: list[str], types: dict[str, ValueInfoProto]
) -> Segment:
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    made = {name for node in nodes for name in node.output}
    read = _read(nodes)
    inputs = sorted(read - made - weights.keys())
    graph = helper.make_graph(
        nodes,
        "segment",
        [types[name] for name in inputs],
        [types[name] for name in outputs],
        [weights[name] for name in sorted(read & weights.keys())],
    )
    opsets = [entry for entry in model.opset_import if entry.domain != DOMAIN]
    piece = helper.make_model(graph, opset_imports=opsets, ir_version=model.ir_version)
    return Segment(piece, tuple(inputs), tuple(outputs))


def _types(model: ModelProto) -> dict[str, ValueInfoProto]:
    """Type and shape of every value; through the function's body, those of the attentions too."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    return {info.name: info for info in [*graph.value_info, *graph.input, *graph.output]}
