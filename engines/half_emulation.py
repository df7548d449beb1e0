"""Half precision made honest on a machine that has none: every intermediate is rounded.

ONNX Runtime's CPU provider accepts float16 graphs but computes most of their operators in float32
and may keep float32 between them. Here a typed graph becomes a float32 graph in which every value
typed float16 is rounded to half precision, overflow to infinity included, right after it is made.
Norms and softmax typed float16 are written out, so that their sums and squares are rounded too;
products within one matrix multiplication, convolution or sum accumulate in float32, as tensor cores
do.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto, NodeProto, TensorProto, helper, inliner, numpy_helper

from engines.ort_engine import OrtEngine, open_session, session_options

# Operators whose result holds nothing but numbers they were given.
MOVERS = frozenset(
    {
        *("Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "GatherElements", "GatherND"),
        *("Identity", "MaxPool", "Pad", "ReduceMax", "ReduceMin", "Relu", "Reshape", "Slice"),
        *("Split", "Squeeze", "Tile", "TopK", "Transpose", "Unsqueeze", "Where"),
    }
)
_HALF, _SINGLE = TensorProto.FLOAT16, TensorProto.FLOAT


class HalfEngine(OrtEngine):
    """A bundle in ONNX Runtime, with half precision emulated by rounding.

    Args:
        bundle: What to run.
        threads: Threads within an operator.
    """

    name = "half"

    def _load(self, model: Path | ModelProto, threads: int | None) -> ort.InferenceSession:
        """See the base class."""
        return half_session(onnx.load(str(model)) if isinstance(model, Path) else model, threads)


def half_session(model: ModelProto, threads: int | None = None) -> ort.InferenceSession:
    """Loads a typed graph so that its float16 values are rounded as half precision is."""
    options = session_options(threads)
    # Optimizing a graph full of casts takes longer than the runs it would save.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return open_session(emulate_half(model), options)


def emulate_half(model: ModelProto) -> ModelProto:
    """The float32 graph that answers as a typed graph does where half precision is half precision.

    Args:
        model: A graph with float16 values; functions are inlined. Left as it is.
    """
    flat = onnx.shape_inference.infer_shapes(inliner.inline_local_functions(model))
    return _Emulation(flat).run()


class _Emulation:
    def __init__(self, model: ModelProto) -> None:
        self._model, graph = model, model.graph
        self._opset = next(entry.version for entry in model.opset_import if entry.domain == "")
        infos = [*graph.value_info, *graph.input, *graph.output]
        self._types = {x.name: x.type.tensor_type.elem_type for x in infos}
        self._types |= {x.name: x.data_type for x in graph.initializer}
        self._ranks = {x.name: len(x.type.tensor_type.shape.dim) for x in infos}
        self._nodes: list[NodeProto] = []
        self._constants: list[TensorProto] = []
        self._count = 0

    def run(self) -> ModelProto:
        graph = self._model.graph
        written_out: dict[str, Callable[[NodeProto], str]] = {
            "LayerNormalization": self._layer_norm,
            "InstanceNormalization": self._instance_norm,
            "Softmax": self._softmax,
        }
        for node in graph.node:
            half = any(self._types.get(name) == _HALF for name in node.output)
            if node.op_type in ("Cast", "CastLike") and self._is_float(node.input[0]):
                self._cast(node, half)
            elif half and node.op_type in written_out:
                result = written_out[node.op_type](node)
                self._nodes.append(helper.make_node("Identity", [result], [node.output[0]]))
            elif half and node.op_type not in MOVERS:
                self._rounded(node)
            else:
                self._nodes.append(node)
        del graph.node[:], graph.value_info[:]
        graph.node.extend(self._nodes)
        for output in graph.output:
            if output.type.tensor_type.elem_type == _HALF:
                output.type.tensor_type.elem_type = _SINGLE
        weights = [_widened(tensor) for tensor in graph.initializer]
        del graph.initializer[:]
        graph.initializer.extend([*weights, *self._constants])
        return self._model

    def _is_float(self, name: str) -> bool:
        return self._types.get(name) in (_HALF, _SINGLE)

    def _cast(self, node: NodeProto, half: bool) -> None:
        """A cast between floats; to half precision it is a rounding, from it nothing."""
        to = next((a.i for a in node.attribute if a.name == "to"), None)
        if half:
            self._nodes.append(self._round(node.input[0], node.output[0]))
            self._nodes.append(self._back(node.output[0]))
        elif to is None or to == _SINGLE:
            self._nodes.append(helper.make_node("Identity", node.input[:1], node.output))
        else:
            self._nodes.append(node)

    def _rounded(self, node: NodeProto) -> None:
        """A node as it is, its half-precision results rounded."""
        copy = NodeProto()
        copy.CopyFrom(node)
        after = []
        for slot, name in enumerate(node.output):
            if self._types.get(name) == _HALF:
                copy.output[slot] = f"{name}\0exact"
                after += [self._round(copy.output[slot], name), self._back(name)]
        for attribute in copy.attribute:
            if copy.op_type == "Cast" and attribute.name == "to":
                attribute.i = _SINGLE
        self._nodes += [copy, *after]

    @staticmethod
    def _round(source: str, target: str) -> NodeProto:
        return helper.make_node("Cast", [source], [f"{target}\0half"], to=_HALF)

    @staticmethod
    def _back(target: str) -> NodeProto:
        return helper.make_node("Cast", [f"{target}\0half"], [target], to=_SINGLE)

    def _op(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        """A node of a written-out operator, rounded."""
        self._count += 1
        name = f"written\0{self._count}"
        self._types[name] = _HALF
        self._rounded(helper.make_node(op_type, list(inputs), [name], **attributes))
        return name

    def _reduce(self, op_type: str, x: str, axes: list[int]) -> str:
        if op_type == "ReduceSum" or self._opset >= 18:
            return self._op(op_type, x, self._constant(np.array(axes, np.int64)), keepdims=1)
        return self._op(op_type, x, axes=axes, keepdims=1)

    def _constant(self, value: Any) -> str:
        self._count += 1
        name = f"constant\0{self._count}"
        self._constants.append(numpy_helper.from_array(value, name))
        return name

    def _normalized(self, x: str, axes: list[int], epsilon: float) -> str:
        centered = self._op("Sub", x, self._reduce("ReduceMean", x, axes))
        variance = self._reduce("ReduceMean", self._op("Mul", centered, centered), axes)
        slack = self._constant(np.float16(epsilon).astype(np.float32))
        deviation = self._op("Sqrt", self._op("Add", variance, slack))
        return self._op("Div", centered, deviation)

    def _layer_norm(self, node: NodeProto) -> str:
        axis = _attribute(node, "axis", -1)
        rank = self._ranks[node.input[0]]
        axes = list(range(axis % rank, rank))
        out = self._normalized(node.input[0], axes, _attribute(node, "epsilon", 1e-5))
        out = self._op("Mul", out, node.input[1])
        return self._op("Add", out, node.input[2]) if len(node.input) > 2 else out

    def _instance_norm(self, node: NodeProto) -> str:
        rank = self._ranks[node.input[0]]
        axes = list(range(2, rank))
        out = self._normalized(node.input[0], axes, _attribute(node, "epsilon", 1e-5))
        shape = self._constant(np.array([-1, *[1] * (rank - 2)], np.int64))
        scale, shift = (self._op("Reshape", name, shape) for name in node.input[1:3])
        return self._op("Add", self._op("Mul", out, scale), shift)

    def _softmax(self, node: NodeProto) -> str:
        axes = [int(_attribute(node, "axis", -1))]
        x = node.input[0]
        power = self._op("Exp", self._op("Sub", x, self._reduce("ReduceMax", x, axes)))
        return self._op("Div", power, self._reduce("ReduceSum", power, axes))


def _widened(tensor: TensorProto) -> TensorProto:
    """A float16 constant in float32; its values are half precision's already."""
    if tensor.data_type != _HALF:
        return tensor
    return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name)


def _attribute(node: NodeProto, name: str, default: Any) -> Any:
    found = next((a for a in node.attribute if a.name == name), None)
    return default if found is None else helper.get_attribute_value(found)
