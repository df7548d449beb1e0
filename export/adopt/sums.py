"""Weighted sums of samples in a graph: what deformable attention is where it is written out.

GridSample nodes are found by the product that weights them, their maps and grids read off, and
where each sample lies in the product. Shape legend: see :mod:`export.adopt.fold`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from onnx import NodeProto, helper

from export.adopt.layout import Graph, Indices, counted


class NotAttention(Exception):
    """Why a sum of samples is not taken for an attention."""


@dataclass
class Sum:
    """Samples that one product weights: ``GridSample`` nodes, what joins them, the product."""

    product: NodeProto
    samples: list[NodeProto] = field(default_factory=list)
    joins: list[NodeProto] = field(default_factory=list)


def find_sums(graph: Graph, left: list[str]) -> list[Sum]:
    """GridSample nodes by the product that weights them.

    Args:
        graph: Of one image.
        left: Takes those whose samples no product weights, and says so.
    """
    found: dict[int, Sum] = {}
    for node in graph.nodes:
        if node.op_type != "GridSample":
            continue
        joins: list[NodeProto] = []
        name = node.output[0]
        while (reader := graph.only_consumer(name)) is not None and (
            graph.moves(reader) or reader.op_type == "Concat"
        ):
            joins.append(reader)
            name = reader.output[0]
        if reader is None or reader.op_type != "Mul":
            left.append(f"{node.name or node.output[0]}: its samples are not weighted and summed")
            continue
        entry = found.setdefault(id(reader), Sum(reader))
        entry.samples.append(node)
        entry.joins += [join for join in joins if all(join is not known for known in entry.joins)]
    return list(found.values())


@dataclass(frozen=True)
class Level:
    """One GridSample: its map ``[M, D, H, W]`` and its grid ``[M, Q, P, 2]``."""

    image: str
    grid: str


def level_of(node: NodeProto) -> Level:
    """What a GridSample reads.

    Raises:
        NotAttention: It samples other than bilinearly with zeros around the map.
    """
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if attributes.get("mode", b"linear") not in (b"bilinear", b"linear"):
        raise NotAttention(f"samples by {attributes['mode'].decode()}")
    if attributes.get("padding_mode", b"zeros") != b"zeros" or attributes.get("align_corners", 0):
        raise NotAttention("samples with another padding, or with aligned corners")
    return Level(node.input[0], node.input[1])


def sum_of(graph: Graph, product: NodeProto) -> tuple[str, int]:
    """The sum over a product, and the axis it sums.

    Raises:
        NotAttention: There is none, or it sums over several axes.
    """
    reader = graph.only_consumer(product.output[0])
    if reader is None or reader.op_type != "ReduceSum":
        raise NotAttention("the weighted samples are not summed")
    attributes = {a.name: helper.get_attribute_value(a) for a in reader.attribute}
    axes = attributes.get("axes") or (
        graph.constant(reader.input[1]) if len(reader.input) > 1 else None
    )
    if axes is None or len(axes) != 1:
        raise NotAttention("the weighted samples are not summed over one axis")
    return reader.output[0], int(axes[0]) % len(graph.shape(product.output[0]))


@dataclass(frozen=True)
class Order:
    """How a product lays out the samples.

    Attributes:
        levels: Of the GridSample nodes, in the order of the levels.
        samples: Name of the product's operand with the samples.
        axis: The axis that is summed.
        rest: ``[M, D, Q]`` index of each sum, in the order of the sums.
    """

    levels: tuple[int, ...]
    samples: str
    axis: int
    rest: Indices


def order_of(graph: Graph, found: Sum, sizes: Sequence[tuple[int, ...]], axis: int) -> Order:
    """Reads off where each sample lies in the product, and that each sum has all of its own.

    Args:
        graph: Of one image.
        found: The samples and their product.
        sizes: ``(M, D, Q, P)`` of each GridSample.
        axis: Of the product, which is summed.

    Raises:
        NotAttention: Sums hold other samples than one query's of one head and channel.
    """
    edges = np.cumsum([0, *(int(np.prod(size)) for size in sizes)])
    sources = {
        node.output[0]: counted(size, int(edge))
        for node, size, edge in zip(found.samples, sizes, edges[:-1], strict=True)
    }
    joined = {join.output[0] for join in found.joins} | set(sources)
    operands = [name for name in found.product.input if name in joined]
    if len(operands) != 1:
        raise NotAttention("samples weighted by samples")
    position = {id(node): i for i, node in enumerate(graph.nodes)}
    joins = sorted(found.joins, key=lambda node: position[id(node)])
    where = np.moveaxis(graph.index_map(sources, joins, operands[0]), axis, -1)
    level = np.searchsorted(edges, where, side="right") - 1
    points = np.array([size[3] for size in sizes])
    sums, point = np.divmod(where - edges[level], points[level])
    level, sums, point = (x.reshape(-1, where.shape[-1]) for x in (level, sums, point))
    if not (
        (level == level[0]).all() and (point == point[0]).all() and (sums == sums[:, :1]).all()
    ):
        raise NotAttention("sums of samples from several places")
    levels = tuple(dict.fromkeys(int(x) for x in level[0]))
    counts = [int(points[i]) for i in levels]
    if (
        len(levels) != len(sizes)
        or not np.array_equal(level[0], np.repeat(levels, counts))
        or not np.array_equal(point[0], np.concatenate([np.arange(n) for n in counts]))
    ):
        raise NotAttention("sums of other samples than all points of all levels")
    return Order(levels, operands[0], axis, sums[:, 0])
