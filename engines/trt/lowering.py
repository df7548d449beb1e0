"""The graph TensorRT gets: a bundle's, with its deformable attention lowered as asked.

A plugin is left as a node; the other bodies are written into the graph call by call, so that every
layer of the engine's report says which attention it belongs to, and so that no plugin registered
earlier in the process takes their place.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import FunctionProto, NodeProto

from engines.bundle import Bundle
from engines.msda_function import (
    DOMAIN,
    OP_TYPE,
    head_shape,
    is_attention,
    node_points,
    node_shapes,
    set_lowering,
)
from engines.trt.backend import BuildLowering


def lowered_model(bundle: Bundle, lowering: BuildLowering) -> onnx.ModelProto:
    """A bundle's graph, its weights loaded, for one lowering of deformable attention."""
    model = onnx.load(str(bundle.model))
    if lowering == "plugin":
        # A parser that does not find the plugin must say so, not fall back on a body.
        _drop_function(model)
        return model
    set_lowering(model, head_shape(bundle.info.model), lowering, gather_sum="reduce")
    function = next(f for f in model.functions if f.domain == DOMAIN and f.name == OP_TYPE)
    nodes = [
        inner
        for node in model.graph.node
        for inner in (_inlined(node, function) if is_attention(node) else [node])
    ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    _drop_function(model)
    return model


Shape = tuple[int, ...]


def attentions(bundle: Bundle) -> Iterator[tuple[str, Shape, Shape, list[int], Shape | None]]:
    """What each attention of a bundle's graph works on, as far as the graph says it.

    Yields:
        Type of the values, shapes of values and weights (-1 where only a run knows a size), the
        sizes of the levels, one after the other, and their numbers of points where unequal.
    """
    graph = onnx.load(str(bundle.model), load_external_data=False)
    known = onnx.shape_inference.infer_shapes(graph, data_prop=True).graph
    kinds = {info.name: info.type.tensor_type for info in (*known.value_info, *known.input)}

    def shape(name: str, rank: int) -> Shape:
        dims = kinds[name].shape.dim if name in kinds else ()
        sizes = [d.dim_value if d.HasField("dim_value") else -1 for d in dims]
        return tuple(sizes) if len(sizes) == rank else (-1,) * rank

    for node in graph.graph.node:
        if is_attention(node):
            value, _, weights = node.input
            kind = kinds[value].elem_type if value in kinds else onnx.TensorProto.FLOAT
            dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind)).name
            points = node_points(node)
            yield (
                dtype,
                shape(value, 4),
                shape(weights, 5 if points is None else 4),
                [s for p in node_shapes(node) for s in p],
                points,
            )


def _drop_function(model: onnx.ModelProto) -> None:
    kept = [f for f in model.functions if not (f.domain == DOMAIN and f.name == OP_TYPE)]
    del model.functions[:]
    model.functions.extend(kept)


def _inlined(call: NodeProto, function: FunctionProto) -> list[NodeProto]:
    """The function's nodes for one call, under names of the call's own."""
    prefix = call.name or call.output[0]
    names = dict(zip(function.input, call.input, strict=True))
    names |= dict(zip(function.output, call.output, strict=True))
    nodes = []
    for inner in function.node:
        node = NodeProto()
        node.CopyFrom(inner)
        own = [names.setdefault(name, f"{prefix}/{name}") for name in inner.output]
        node.name = f"{prefix}/{inner.name or inner.output[0]}"
        node.input[:] = [names[name] for name in inner.input]
        node.output[:] = own
        nodes.append(node)
    return nodes
