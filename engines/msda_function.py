"""The model-local ONNX function ``detr::MSDeformAttn`` and its two bodies in standard operators.

An exported graph holds one node per multi-scale deformable attention (Zhu et al., Deformable DETR,
ICLR 2021, equation 3). A runtime that knows the node (our native CPU engine, the TensorRT plugin)
runs it; every other runtime inlines the body of this function:

* ``gridsample``: one GridSample per level. Short, but several TensorRT releases compile it wrongly,
  and its meaning changed with opset 20, so it is for opset 17 and 18 only.
* ``gather``: bilinear interpolation written out, four GatherND for all levels at once. Its weighted
  sum is written in one of two ways (:data:`GatherSum`): as a MatMul, or as Mul, Add and ReduceSum.

Both bodies are free of Shape, Loop and If: batch and query count stay dynamic through Flatten and
through the 0 and -1 of Reshape; the sizes of levels and heads are constants.

Shape legend: B batch, S tokens of all levels, M heads, D channels of a head, Q queries, V levels,
P points of a level, K samples of all levels where their numbers differ (:mod:`detr.points`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import onnx
from onnx import FunctionProto, NodeProto, helper, numpy_helper

from detr.points import Points, level_points, unequal

DOMAIN = "detr"
OP_TYPE = "MSDeformAttn"
DOMAIN_VERSION = 1
PLUGIN_NAMESPACE = "detr"
# Where the plugin for unequal numbers of points is. It has one attribute more, and TensorRT's quick
# plugins have no optional ones.
UNEQUAL_PLUGIN_NAMESPACE = "detr_unequal"
PLUGIN_VERSION = "1"
OPSETS = (17, 18)

Lowering = Literal["gridsample", "gather"]
# How the ``gather`` body sums. A runtime that runs operator after operator reads the samples once
# for a ``matmul``, four times for products and sums. A compiler such as TensorRT's puts look-ups,
# products and sums into one kernel and writes no sample out (``reduce``), but stops at a MatMul,
# whose operands then lie in memory: 849 MB instead of 12 for one encoder attention of KITTI's size.
GatherSum = Literal["matmul", "reduce"]
LevelShapes = Sequence[tuple[int, int]]

# The gather body computes token indices in float32, which holds integers exactly up to here.
_EXACT_FLOAT = 2**24


@dataclass(frozen=True)
class HeadShape:
    """The sizes of an attention, beside those of its levels.

    Attributes:
        heads: M.
        channels: D, channels of one head.
        points: P, sampling points per head and level, or of each level.
    """

    heads: int
    channels: int
    points: Points


class AttentionSizes(Protocol):
    """A detector's config, or what is known of a bundle's graph."""

    @property
    def attention_sizes(self) -> tuple[int, int, Points]:
        """Heads, channels of a head, and points per level."""


def head_shape(model: AttentionSizes) -> HeadShape:
    """The sizes of every deformable attention of a model."""
    return HeadShape(*model.attention_sizes)


class _Body:
    """Collects the nodes of a function; every method returns the name of what it made.

    Args:
        half: Whether what is looked up may be float16.
    """

    def __init__(self, half: bool) -> None:
        self._half = half
        self.nodes: list[NodeProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._count = 0

    def op(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        return self.ops(op_type, 1, *inputs, **attributes)[0]

    def ops(self, op_type: str, outputs: int, *inputs: str, **attributes: Any) -> list[str]:
        names = [f"{op_type.lower()}_{self._count}_{i}" for i in range(outputs)]
        self._count += 1
        self.nodes.append(helper.make_node(op_type, list(inputs), names, **attributes))
        return names

    def const(self, value: npt.ArrayLike, dtype: npt.DTypeLike = np.float32) -> str:
        array = np.asarray(value, dtype=dtype)
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.op("Constant", value=numpy_helper.from_array(array))
        return self._constants[key]

    def shape(self, *sizes: int) -> str:
        return self.const(sizes, np.int64)

    def single(self, name: str) -> str:
        """The value in float32, cast if it may be anything else."""
        return self.op("Cast", name, to=onnx.TensorProto.FLOAT) if self._half else name


def make_function(
    shapes: LevelShapes,
    head_shape: HeadShape,
    lowering: Lowering,
    opset: int,
    half: bool = False,
    gather_sum: GatherSum = "matmul",
) -> FunctionProto:
    """Builds the function for one set of level sizes.

    Args:
        shapes: (height, width) of each level, finest first.
        head_shape: M, D and P.
        lowering: Which body.
        opset: Version of the standard operators in the body, 17 or 18.
        half: Whether values may be float16. They are then weighted and summed in float32 all the
            same, and the result is given back in the type they came in.
        gather_sum: How the ``gather`` body sums.

    Returns:
        A function with inputs ``value [B,S,M,D]``, ``locations [B,Q,M,V,P,2]`` ((x, y) in [0, 1])
        and ``weights [B,Q,M,V,P]``, output ``[B,Q,M*D]`` of value's type; locations and weights are
        float32. With unequal numbers of points these are ``[B,Q,M,K,2]`` and ``[B,Q,M,K]``.

    Raises:
        ValueError: An opset or a size the body cannot express.
    """
    if opset not in OPSETS:
        raise ValueError(f"opset {opset}: the bodies are written for {OPSETS}")
    body = _Body(half)
    levels = [(int(h), int(w)) for h, w in shapes]
    if lowering == "gridsample":
        result = _gridsample_body(body, levels, head_shape)
    else:
        result = _gather_body(body, levels, head_shape, gather_sum)
    if half:
        body.nodes.append(helper.make_node("CastLike", [result, "value"], ["output"]))
    else:
        body.nodes.append(helper.make_node("Identity", [result], ["output"]))
    return helper.make_function(
        domain=DOMAIN,
        fname=OP_TYPE,
        inputs=["value", "locations", "weights"],
        outputs=["output"],
        nodes=body.nodes,
        opset_imports=[helper.make_opsetid("", opset)],
        attributes=list(node_attributes((), unequal(head_shape.points))),
    )


def node_attributes(spatial_shapes: Sequence[int], points: Sequence[int] | None) -> dict[str, Any]:
    """A node's attributes, among them those by which TensorRT's parser finds the plugin.

    Args:
        spatial_shapes: Height and width of each level, one after the other.
        points: Number of points of each level where they are unequal.
    """
    return {
        "spatial_shapes": [int(size) for size in spatial_shapes],
        **({} if points is None else {"points": [int(count) for count in points]}),
        "plugin_namespace": PLUGIN_NAMESPACE if points is None else UNEQUAL_PLUGIN_NAMESPACE,
        "plugin_version": PLUGIN_VERSION,
    }


def make_node(
    value: str,
    locations: str,
    weights: str,
    output: str,
    shapes: LevelShapes,
    name: str = "",
    points: Sequence[int] | None = None,
) -> NodeProto:
    """A call of the function.

    Args:
        value: Name of an input, as the next two.
        locations: Where it is sampled.
        weights: Of the samples.
        output: Name of the result.
        shapes: (height, width) of each level.
        name: Of the node.
        points: Number of points of each level where they are unequal.
    """
    return helper.make_node(
        OP_TYPE,
        [value, locations, weights],
        [output],
        name=name,
        domain=DOMAIN,
        **node_attributes([size for shape in shapes for size in shape], points),
    )


def node_shapes(node: NodeProto) -> tuple[tuple[int, int], ...]:
    """The level sizes a node carries."""
    flat = next(list(a.ints) for a in node.attribute if a.name == "spatial_shapes")
    return tuple(zip(flat[::2], flat[1::2], strict=True))


def node_points(node: NodeProto) -> tuple[int, ...] | None:
    """Number of points of each level where a node's are unequal."""
    return next((tuple(a.ints) for a in node.attribute if a.name == "points"), None)


def is_attention(node: NodeProto) -> bool:
    return node.op_type == OP_TYPE and node.domain == DOMAIN


def set_lowering(
    model: onnx.ModelProto,
    head_shape: HeadShape,
    lowering: Lowering,
    gather_sum: GatherSum = "matmul",
) -> None:
    """Gives a model that calls the function its body, in place of any it had.

    A model without calls, such as a dense detector, is left as it is. Values may be float16 where
    the graph says that one of them is.

    Raises:
        ValueError: The nodes of the model disagree on the level sizes, or have other points than
            ``head_shape``.
    """
    attentions = [node for node in model.graph.node if is_attention(node)]
    shapes = {node_shapes(node) for node in attentions}
    if not shapes:
        return
    if len(shapes) != 1:
        raise ValueError(f"one set of level sizes expected, found {sorted(shapes)}")
    if {node_points(node) for node in attentions} != {unequal(head_shape.points)}:
        raise ValueError(f"nodes of other points than {head_shape.points}")
    opset = next(entry.version for entry in model.opset_import if entry.domain == "")
    values = {node.input[0] for node in attentions}
    half = any(
        info.name in values and info.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
        for info in [*model.graph.value_info, *model.graph.input]
    )
    kept = [f for f in model.functions if not (f.domain == DOMAIN and f.name == OP_TYPE)]
    del model.functions[:]
    function = make_function(shapes.pop(), head_shape, lowering, opset, half, gather_sum)
    model.functions.extend([*kept, function])
    if all(entry.domain != DOMAIN for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, DOMAIN_VERSION))


def _gridsample_body(body: _Body, shapes: list[tuple[int, int]], head: HeadShape) -> str:
    """Heads join the batch; each level is sampled on its own, then all are weighted together."""
    tokens = [h * w for h, w in shapes]
    value = body.op("Transpose", "value", perm=[0, 2, 3, 1])
    # In float32 before the sampling: TensorRT wants maps and grid to be of one type.
    value = body.single(body.op("Reshape", value, body.shape(-1, head.channels, sum(tokens))))
    maps = _split(body, value, tokens, axis=2)  # [B*M,D,h*w] each

    # GridSample wants [-1, 1]; locations are [0, 1] of the map's outer edges (align_corners=0).
    grid = body.op("Mul", "locations", body.const(2.0))
    grid = body.op("Sub", grid, body.const(1.0))
    points = level_points(head.points, len(shapes))
    if isinstance(head.points, int):
        grid = body.op("Transpose", grid, perm=[0, 2, 3, 1, 4, 5])  # [B,M,V,Q,P,2]
        grids = _split(body, grid, [1] * len(shapes), axis=2)
    else:
        grid = body.op("Transpose", grid, perm=[0, 2, 1, 3, 4])  # [B,M,Q,K,2]
        grids = _split(body, grid, list(points), axis=3)

    samples = []
    for (h, w), level, where, count in zip(shapes, maps, grids, points, strict=True):
        image = body.op("Reshape", level, body.shape(0, 0, h, w))
        # Flatten merges B and M without knowing B or Q.
        where = body.op("Flatten", where, axis=2)
        where = body.op("Reshape", where, body.shape(0, -1, count, 2))
        sample = body.op(
            "GridSample", image, where, mode="bilinear", padding_mode="zeros", align_corners=0
        )
        samples.append(sample)  # [B*M,D,Q,P]
    sampled = samples[0] if len(samples) == 1 else body.op("Concat", *samples, axis=3)

    order = [0, 2, 1, 3, 4] if isinstance(head.points, int) else [0, 2, 1, 3]
    weights = body.op("Transpose", "weights", perm=order)
    weights = body.op("Flatten", weights, axis=2)
    weights = body.op("Reshape", weights, body.shape(0, 1, -1, sum(points)))
    weighted = body.op("Mul", sampled, weights)
    summed = body.op("ReduceSum", weighted, body.shape(3), keepdims=0)  # [B*M,D,Q]
    # As [Q,B*M,D] the heads of an image are neighbors, so B and Q need not be known.
    summed = body.op("Transpose", summed, perm=[2, 0, 1])
    merged = body.op("Reshape", summed, body.shape(0, -1, head.heads * head.channels))
    return body.op("Transpose", merged, perm=[1, 0, 2])


def _gather_body(
    body: _Body, shapes: list[tuple[int, int]], head: HeadShape, gather_sum: GatherSum
) -> str:
    """All levels at once: one look-up per corner in the flat token table ``[B, S*M, D]``."""
    tokens = [h * w for h, w in shapes]
    rows = sum(tokens) * head.heads
    if rows >= _EXACT_FLOAT:
        raise ValueError(f"{rows} rows of tokens and heads exceed exact float32 indices")
    starts = np.cumsum([0, *tokens[:-1]])
    # Token s of head m is row s*M + m, so the value needs no transpose. [M,V,1] or [M,K]
    first_row = starts[None, :] * head.heads + np.arange(head.heads)[:, None]
    first_row = _per_sample(first_row, head.points)
    table = body.op("Reshape", "value", body.shape(0, rows, head.channels))

    columns = _corners(body, 0, [w for _, w in shapes], head.points)
    lines = _corners(body, 1, [h for h, _ in shapes], head.points)
    widths = np.array([w * head.heads for _, w in shapes])
    line_step = body.const(_per_sample(widths, head.points))
    column_step = body.const(head.heads)
    samples = sum(level_points(head.points, len(shapes)))
    corners = []
    for line, line_share in lines:
        line_row = body.op("Add", body.op("Mul", line, line_step), body.const(first_row))
        line_weight = body.op("Mul", "weights", line_share)
        for column, column_share in columns:
            row = body.op("Add", line_row, body.op("Mul", column, column_step))
            row = body.op("Cast", row, to=onnx.TensorProto.INT64)
            row = body.op("Reshape", row, body.shape(0, 0, head.heads, samples, 1))
            found = body.op("GatherND", table, row, batch_dims=1)  # [B,Q,M,K,D]
            found = body.single(found)
            weight = body.op("Mul", line_weight, column_share)
            if gather_sum == "matmul":
                weight = body.op("Reshape", weight, body.shape(0, 0, head.heads, 1, samples))
                corners.append(body.op("MatMul", weight, found))  # [B,Q,M,1,D]
            else:
                weight = body.op("Reshape", weight, body.shape(0, 0, head.heads, samples, 1))
                corners.append(body.op("Mul", found, weight))  # [B,Q,M,K,D]
    total = corners[0]
    for corner in corners[1:]:
        total = body.op("Add", total, corner)
    if gather_sum == "reduce":
        total = body.op("ReduceSum", total, body.shape(3), keepdims=0)
    return body.op("Reshape", total, body.shape(0, 0, head.heads * head.channels))


def _per_sample(
    levels: np.ndarray[Any, np.dtype[Any]], points: Points
) -> np.ndarray[Any, np.dtype[Any]]:
    """Numbers ``[..., V]`` as they meet locations: ``[..., V, 1]``, or each level's repeated."""
    return levels[..., None] if isinstance(points, int) else np.repeat(levels, points, axis=-1)


def _corners(body: _Body, axis: int, sizes: list[int], points: Points) -> list[tuple[str, str]]:
    """The two cells around each location along one axis.

    Args:
        body: Takes the nodes.
        axis: 0 for x, 1 for y.
        sizes: Extent of each level along the axis.
        points: P, or that of each level.

    Returns:
        For the lower and the upper cell: its index, clipped into the map, and its bilinear weight,
        which is 0 where the cell lies outside (zero padding); both ``[B,Q,M,V,P]`` float32, or
        ``[B,Q,M,K]``.
    """
    size = _per_sample(np.array(sizes, np.float32), points)
    last = 5 if isinstance(points, int) else 4
    where = body.op("Gather", "locations", body.const(axis, np.int64), axis=last)
    where = body.op("Sub", body.op("Mul", where, body.const(size)), body.const(0.5))
    # Beyond one cell outside nothing is left to see; the clip keeps far locations exact.
    where = body.op("Min", where, body.const(size))
    where = body.op("Max", where, body.const(-1.0))
    low = body.op("Floor", where)
    high = body.op("Add", low, body.const(1.0))
    high_share = body.op("Sub", where, low)
    low_share = body.op("Sub", body.const(1.0), high_share)
    corners = []
    for cell, share in ((low, low_share), (high, high_share)):
        inside = body.op("Max", body.op("Min", cell, body.const(size - 1)), body.const(0.0))
        mask = body.op("Cast", body.op("Equal", cell, inside), to=onnx.TensorProto.FLOAT)
        corners.append((inside, body.op("Mul", share, mask)))
    return corners


def _split(body: _Body, data: str, sizes: list[int], axis: int) -> list[str]:
    if len(sizes) == 1:
        return [data]
    return body.ops("Split", len(sizes), data, body.shape(*sizes), axis=axis)
