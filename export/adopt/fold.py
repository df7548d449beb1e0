"""Deformable attention written as GridSample, put back into one node.

Exporters write multi-scale deformable attention (Zhu et al., Deformable DETR, ICLR 2021, equation
3) as one GridSample per level, whose samples are weighted and summed. Here the samples of a
weighted sum are traced back to one value, one set of locations and one set of weights, whatever
operators move them in between (:mod:`export.adopt.layout`), and a node ``detr::MSDeformAttn`` takes
their place. A sum that is anything else stays as it is.

Shape legend: S tokens of all levels, M heads, D channels of a head, Q queries, V levels, P points
of a level, K samples of all levels. Graphs are of one image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper, shape_inference

from detr.points import Points, joined_points, level_points, sample_axes, unequal
from engines.msda_function import HeadShape, make_node
from export.adopt.layout import Graph, Indices, counted, transposition
from export.adopt.sums import Level, NotAttention, Order, Sum, find_sums, level_of, order_of, sum_of


@dataclass(frozen=True)
class Fold:
    """An attention that became one node.

    Attributes:
        name: Of the node.
        shapes: (height, width) of its levels.
        head: Its other sizes.
    """

    name: str
    shapes: tuple[tuple[int, int], ...]
    head: HeadShape


@dataclass(frozen=True)
class Folded:
    """What came of a graph.

    Attributes:
        model: With what was recognized folded.
        folds: One per attention, in order.
        left: For each sum of samples that was left as it was, its node and the reason.
    """

    model: ModelProto
    folds: tuple[Fold, ...]
    left: tuple[str, ...]


def fold_attention(model: ModelProto) -> Folded:
    """Folds every deformable attention of a graph.

    Args:
        model: A graph of one image, all sizes static; it is left as it is.

    Returns:
        Another graph. Its ``detr::MSDeformAttn`` nodes have no function yet.
    """
    copy = ModelProto()
    copy.CopyFrom(shape_inference.infer_shapes(model, data_prop=True))
    graph = Graph(copy)
    folds: list[Fold] = []
    left: list[str] = []
    new: dict[int, list[NodeProto]] = {}
    for found in find_sums(graph, left):
        try:
            fold, nodes, replaced = _fold(graph, found, len(folds))
        except NotAttention as reason:
            left.append(f"{found.product.name or found.product.output[0]}: {reason}")
            continue
        new[id(graph.producer[replaced])] = nodes
        folds.append(fold)
    if folds:
        _rebuild(copy, graph, new)
    return Folded(copy, tuple(folds), tuple(left))


def _fold(graph: Graph, found: Sum, number: int) -> tuple[Fold, list[NodeProto], str]:
    """The nodes of one attention, and the value they make in the old nodes' place."""
    maps = [level_of(node) for node in found.samples]
    try:
        sizes = [graph.shape(node.output[0]) for node in found.samples]
    except LookupError as error:
        raise NotAttention("sizes that are not known") from error
    heads, channels, queries = sizes[0][:3]
    if any(size[:3] != (heads, channels, queries) for size in sizes):
        raise NotAttention("levels of other heads, channels or queries")
    total, axis = sum_of(graph, found.product)
    order = order_of(graph, found, sizes, axis)
    levels = [maps[i] for i in order.levels]
    points = joined_points([sizes[i][3] for i in order.levels])
    name = f"adopted.attention_{number}"
    make = _Nodes(name)
    shapes = tuple((m[2], m[3]) for m in (graph.shape(x.image) for x in levels))
    value = _value(graph, make, levels, heads, channels)
    locations = _locations(graph, make, levels, heads, queries, points)
    axes = (1, queries, heads, *sample_axes(points, len(levels)))
    weights = _weights(graph, make, found.product, order, axes)
    attended = make.name("output")
    node = make_node(value, locations, weights, attended, shapes, name, unequal(points))
    make.nodes.append(node)
    replaced = _output(graph, make, attended, total, order, (queries, heads, channels))
    return Fold(name, shapes, HeadShape(heads, channels, points)), make.nodes, replaced


class _Nodes:
    """Collects the nodes of one attention."""

    def __init__(self, prefix: str) -> None:
        self._prefix, self._count = prefix, 0
        self.nodes: list[NodeProto] = []

    def name(self, what: str) -> str:
        self._count += 1
        return f"{self._prefix}/{what}_{self._count}"

    def op(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        output = self.name(op_type)
        self.nodes.append(helper.make_node(op_type, inputs, [output], name=output, **attributes))
        return output

    def constant(self, value: object, dtype: type[np.generic]) -> str:
        return self.op("Constant", value=numpy_helper.from_array(np.asarray(value, dtype)))

    def reshape(self, name: str, shape: Sequence[int]) -> str:
        return self.op("Reshape", name, self.constant(shape, np.int64))

    def arranged(
        self, graph: Graph, name: str, wanted: Indices, shape: Sequence[int], what: str
    ) -> str:
        """A value's elements in a wanted order, by one Transpose and one Reshape at most."""
        perm = transposition(wanted, graph.shape(name))
        if perm is None:
            raise NotAttention(f"{what} in an order that no transposition gives")
        if list(perm) != sorted(perm):
            name = self.op("Transpose", name, perm=perm)
        return self.reshape(name, shape)


def _read(graph: Graph, name: str) -> tuple[str, Indices]:
    """A value's source, and each element's index in it."""
    source, path = graph.source(name)
    return source, graph.index_map({source: counted(graph.shape(source))}, path, name)


def _value(graph: Graph, make: _Nodes, levels: Sequence[Level], heads: int, channels: int) -> str:
    """``[1, S, M, D]``."""
    read = [_read(graph, level.image) for level in levels]
    tokens = [i.reshape(heads, channels, -1).transpose(2, 0, 1) for _, i in read]
    shape = (1, -1, heads, channels)
    if len({source for source, _ in read}) == 1:
        return make.arranged(graph, read[0][0], np.concatenate(tokens), shape, "values")
    parts = [
        make.arranged(graph, source, indices, shape, "values")
        for (source, _), indices in zip(read, tokens, strict=True)
    ]
    return make.op("Concat", *parts, axis=1)


def _locations(
    graph: Graph, make: _Nodes, levels: Sequence[Level], heads: int, queries: int, points: Points
) -> str:
    """``[1, Q, M, V, P, 2]`` or ``[1, Q, M, K, 2]`` in parts of a map, from grids of -1 to 1."""
    counts = level_points(points, len(levels))
    read = [_read(graph, level.grid) for level in levels]
    grids = [
        i.reshape(heads, queries, n, 2).transpose(1, 0, 2, 3)
        for (_, i), n in zip(read, counts, strict=True)
    ]
    if len({source for source, _ in read}) == 1:
        parts = _zero_to_one(graph, make, read[0][0])
        shape = (1, queries, heads, *sample_axes(points, len(levels)), 2)
        return make.arranged(graph, parts, np.concatenate(grids, axis=2), shape, "locations")
    each = [
        make.arranged(
            graph,
            _zero_to_one(graph, make, source),
            indices,
            (1, queries, heads, *((1, n) if isinstance(points, int) else (n,)), 2),
            "locations",
        )
        for (source, _), indices, n in zip(read, grids, counts, strict=True)
    ]
    return make.op("Concat", *each, axis=3)


def _zero_to_one(graph: Graph, make: _Nodes, grid: str) -> str:
    """What a grid was made of by ``2 x - 1``."""
    node = graph.producer.get(grid)
    if node is not None and node.op_type in ("Sub", "Add"):
        shift, twice = graph.constant(node.input[1]), graph.producer.get(node.input[0])
        wanted = 1.0 if node.op_type == "Sub" else -1.0
        factors: list[str] = [] if twice is None or twice.op_type != "Mul" else list(twice.input)
        if shift is not None and (shift == wanted).all():
            for one, other in (factors, factors[::-1]) if factors else ():
                factor = graph.constant(other)
                if factor is not None and (factor == 2).all():
                    return one
    raise NotAttention("a grid that is not made of locations by 2 x - 1")


def _weights(
    graph: Graph, make: _Nodes, product: NodeProto, order: Order, shape: tuple[int, ...]
) -> str:
    """``[1, Q, M, V, P]`` or ``[1, Q, M, K]``, as ``shape`` has it."""
    _, queries, heads, *axes = shape
    samples = math.prod(axes)
    name = next(one for one in product.input if one != order.samples)
    source, indices = _read(graph, name)
    spread = np.broadcast_to(indices, graph.shape(product.output[0]))
    rows = np.moveaxis(spread, order.axis, -1).reshape(-1, samples)
    by_sum = np.empty_like(rows)
    by_sum[order.rest] = rows  # [M*D*Q, K], whatever order the sums are in
    table = by_sum.reshape(heads, -1, queries, samples)
    if not (table == table[:, :1]).all():
        raise NotAttention("weights that differ between a head's channels")
    return make.arranged(graph, source, table[:, 0].transpose(1, 0, 2), shape, "weights")


def _output(
    graph: Graph,
    make: _Nodes,
    attended: str,
    total: str,
    order: Order,
    shape: tuple[int, int, int],
) -> str:
    """Brings ``[1, Q, M*D]`` into the shape of what it replaces.

    That is the last value behind the sum that is in the node's own order, so that the exporter's
    transpositions fall away; the sum itself where none is.

    Returns:
        The name of what is replaced; the last node has it as its output.
    """
    queries, heads, channels = shape
    own = counted((queries, heads, channels)).transpose(1, 2, 0).reshape(-1)  # by [M, D, Q]
    at_sum = own[order.rest].reshape(graph.shape(total))
    path: list[NodeProto] = []
    best, name = None, total
    while True:
        at = graph.index_map({total: at_sum}, path, name)
        if np.array_equal(at.reshape(-1), np.arange(at.size)):
            best = name
        reader = graph.only_consumer(name)
        if reader is None or not graph.moves(reader) or len(reader.output) > 1:
            break
        path.append(reader)
        name = reader.output[0]
    if best is None:
        split = make.reshape(attended, shape)
        perm = transposition(at_sum, shape)
        if perm is None:
            raise NotAttention("sums in an order that no transposition gives")
        attended, best = make.op("Transpose", split, perm=perm), total
    make.reshape(attended, graph.shape(best))
    make.nodes[-1].output[0] = best
    return best


def _rebuild(model: ModelProto, graph: Graph, new: dict[int, list[NodeProto]]) -> None:
    """Puts new nodes where the old ones were, and drops what nothing reads any more."""
    nodes = [one for node in graph.nodes for one in new.get(id(node), [node])]
    needed = {value.name for value in model.graph.output}
    kept: list[NodeProto] = []
    for node in reversed(nodes):
        if needed & set(node.output):
            kept.append(node)
            needed |= {name for name in node.input if name}
    copies = []
    for node in reversed(kept):
        copy = NodeProto()
        copy.CopyFrom(node)
        copies.append(copy)
    constants = [x for x in model.graph.initializer if x.name in needed]
    values = [x for x in model.graph.value_info if x.name in needed]
    del model.graph.node[:], model.graph.initializer[:], model.graph.value_info[:]
    model.graph.node.extend(copies)
    model.graph.initializer.extend(constants)
    model.graph.value_info.extend(values)
