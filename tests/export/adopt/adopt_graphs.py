"""Graphs with GridSample in them, built by hand: attentions in many spellings, and other things."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

HEADS, CHANNELS, QUERIES, POINTS = 2, 3, 5, 4
SHAPES = ((4, 6), (2, 3))
TOKENS = sum(h * w for h, w in SHAPES)


class Nodes:
    """Collects nodes; every method returns the name of what it made."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []

    def op(self, op_type: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        names = [f"{op_type}{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op_type, inputs, names, names[0], **attributes))
        return names[0] if outputs == 1 else names

    def const(self, value: Any, dtype: Any = np.int64) -> str:
        name: str = self.op("Constant", value=numpy_helper.from_array(np.asarray(value, dtype)))
        return name

    def reshape(self, name: str, *shape: int) -> str:
        made: str = self.op("Reshape", name, self.const(shape))
        return made

    def model(self, output: str, shape: Sequence[int], **inputs: Sequence[int]) -> ModelProto:
        number = TensorProto.FLOAT
        graph = helper.make_graph(
            self.nodes,
            "g",
            [helper.make_tensor_value_info(n, number, s) for n, s in inputs.items()],
            [helper.make_tensor_value_info(output, number, shape)],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


INPUTS = {
    "value": (1, TOKENS, HEADS * CHANNELS),
    "locations": (1, QUERIES, HEADS, len(SHAPES), POINTS, 2),
    "weights": (1, QUERIES, HEADS, len(SHAPES), POINTS),
}


def attention(
    split: bool = True,
    stacked: bool = True,
    subtract: bool = True,
    keep_heads_apart: bool = False,
    channels_last: bool = True,
    order: Sequence[int] = (0, 1),
    own_maps: bool = False,
    sample: dict[str, Any] | None = None,
    grid: Callable[[Nodes, str], str] | None = None,
    weighting: Callable[[Nodes, str], str] | None = None,
    pieces: tuple[int, ...] = (POINTS, POINTS),
) -> ModelProto:
    """Deformable attention as one exporter or another writes it, or nearly so.

    Args:
        split: Levels by Split; else by Slice.
        stacked: Samples by Unsqueeze and Concat before the points; else by Concat alone.
        subtract: The grid is ``2 x - 1``; else ``2 x + (-1)``.
        keep_heads_apart: The output is ``[1, M, D, Q]``.
        channels_last: The value is ``[1, S, M*D]``; else ``[1, M*D, S]``.
        order: In which the levels are sampled and joined.
        own_maps: Each level has an input of its own.
        sample: Attributes of GridSample that differ.
        grid: What is done to the grid besides.
        weighting: What is done to the weights, ``[M, 1, Q, V*P]``, besides.
        pieces: Points of each level; unequal ones follow one another on one axis.
    """
    n = Nodes()
    wide, total = HEADS * CHANNELS, sum(pieces)
    even = len(set(pieces)) == 1
    inputs: dict[str, tuple[int, ...]] = dict(INPUTS)
    if not even:
        inputs["locations"] = (1, QUERIES, HEADS, total, 2)
        inputs["weights"] = (1, QUERIES, HEADS, total)
    sizes = [h * w for h, w in SHAPES]
    if own_maps:
        del inputs["value"]
        inputs |= {f"map{i}": (1, wide, h, w) for i, (h, w) in enumerate(SHAPES)}
        maps = [f"map{i}" for i in range(len(SHAPES))]
    else:
        tokens = "value"
        if not channels_last:
            inputs["value"] = (1, wide, TOKENS)
            tokens = n.op("Transpose", "value", perm=[0, 2, 1])
        tokens = n.reshape(tokens, 1, TOKENS, HEADS, CHANNELS)
        if split:
            maps = n.op("Split", tokens, n.const(sizes), outputs=len(sizes), axis=1)
        else:
            edges = np.cumsum([0, *sizes])
            maps = [
                n.op("Slice", tokens, n.const([a]), n.const([b]), n.const([1]))
                for a, b in pairwise(edges)
            ]
        maps = [n.op("Transpose", n.reshape(m, 1, -1, wide), perm=[0, 2, 1]) for m in maps]
    doubled = n.op("Mul", "locations", n.const(2.0, np.float32))
    shift = n.const(1.0 if subtract else -1.0, np.float32)
    grids = n.op("Sub" if subtract else "Add", doubled, shift)
    if grid is not None:
        grids = grid(n, grids)
    if even:
        places = [n.op("Gather", grids, n.const(level), axis=3) for level in range(len(pieces))]
    else:
        places = n.op("Split", grids, n.const(pieces), outputs=len(pieces), axis=3)
    samples = []
    for level in order:
        height, width = SHAPES[level]
        image = n.reshape(maps[level], HEADS, CHANNELS, height, width)
        where = n.op("Transpose", places[level], perm=[0, 2, 1, 3, 4])
        where = n.reshape(where, HEADS, QUERIES, pieces[level], 2)
        given = {"mode": "bilinear", "padding_mode": "zeros", "align_corners": 0} | (sample or {})
        found = n.op("GridSample", image, where, **given)
        samples.append(n.op("Unsqueeze", found, n.const([3])) if stacked else found)
    joined = n.op("Concat", *samples, axis=3)
    joined = n.reshape(joined, HEADS, CHANNELS, QUERIES, total)
    if even and tuple(order) == (0, 1):
        share = n.op("Transpose", "weights", perm=[0, 2, 1, 3, 4])
    elif even:
        parts = [n.op("Gather", "weights", n.const(level), axis=3) for level in order]
        share = n.op("Transpose", n.op("Concat", *parts, axis=3), perm=[0, 2, 1, 3])
    else:
        share = n.op("Transpose", "weights", perm=[0, 2, 1, 3])
    share = n.reshape(share, HEADS, 1, QUERIES, total)
    if weighting is not None:
        share = weighting(n, share)
    summed = n.op("ReduceSum", n.op("Mul", joined, share), n.const([-1]), keepdims=0)
    if keep_heads_apart:
        output = n.reshape(summed, 1, HEADS, CHANNELS, QUERIES)
        last = n.op("Relu", output)
        return n.model(last, (1, HEADS, CHANNELS, QUERIES), **inputs)
    merged = n.op("Transpose", n.reshape(summed, 1, wide, QUERIES), perm=[0, 2, 1])
    return n.model(n.op("Relu", merged), (1, QUERIES, wide), **inputs)


def spatial_transformer(seed: int) -> ModelProto:
    """GridSample of whole maps, weighted and summed in ways no attention is."""
    rng = np.random.default_rng(seed)
    n = Nodes()
    height, width, channels = (int(x) for x in rng.integers(3, 7, 3))
    maps = int(rng.integers(1, 4))
    inputs: dict[str, tuple[int, ...]] = {"grid": (1, height, width, 2)}
    samples = []
    for i in range(maps):
        inputs[f"map{i}"] = (1, channels, height, width)
        where = "grid"
        if rng.random() < 0.5:
            where = n.op(
                "Sub", n.op("Mul", where, n.const(2.0, np.float32)), n.const(1.0, np.float32)
            )
        samples.append(n.op("GridSample", f"map{i}", where, align_corners=int(rng.integers(2))))
    found = samples[0]
    if maps > 1:
        kind = rng.choice(["Add", "Mul", "Concat"])
        if kind == "Concat":
            found = n.op("Concat", *samples, axis=int(rng.integers(1, 4)))
        else:
            for other in samples[1:]:
                found = n.op(str(kind), found, other)
    if rng.random() < 0.7:
        found = n.op("Mul", found, n.const(rng.random(1), np.float32))
    axis = int(rng.integers(1, 4))
    found = n.op("ReduceSum", found, n.const([axis]), keepdims=0)
    # A rank is enough for the checker; sizes are for the shape inference to find.
    return n.model(found, [None, None, None], **inputs)  # type: ignore[list-item]
