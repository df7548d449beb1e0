"""OpenVINO's 3x3 convolutions in our kernel (:mod:`detr.winograd`), on a CPU with AVX2.

OpenVINO multiplies out what Winograd's algorithm saves half of. The nodes it concerns are exchanged
before the graph is read, together with the addition and activation that follow. Between two of ours
maps stay as the kernel has them, with the channels last; elsewhere OpenVINO copies them there.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

import onnx
from onnx import AttributeProto, NodeProto, TensorProto, helper, numpy_helper

from detr import msda, winograd
from engines.msda_function import DOMAIN, DOMAIN_VERSION

OP_TYPE = "Convolution3x3"
# What a convolution must say, where it says anything.
_WANTED: dict[str, Any] = {
    "kernel_shape": [3, 3],
    "strides": [1, 1],
    "pads": [1, 1, 1, 1],
    "dilations": [1, 1],
    "group": 1,
    "auto_pad": b"NOTSET",
}


def pays() -> bool:
    """Whether the kernel is here and was found faster: with AVX-512 nobody has measured it."""
    return winograd.available() and msda.instruction_set() == "avx2"


class _Chain(NamedTuple):
    """A convolution with what is computed along with it.

    Attributes:
        added: Name of the map added to it, if any.
        activation: After that.
        nodes: All of these, in order.
    """

    added: str | None
    activation: winograd.Activation
    nodes: list[NodeProto]


def exchange(model: onnx.ModelProto) -> list[winograd.Convolution]:
    """Puts a node of ours in place of every convolution the kernel computes.

    Args:
        model: Changed in place; nodes in order.

    Returns:
        The convolutions, as the nodes' attribute ``index`` counts them.
    """
    graph = model.graph
    constants = {x.name: x for x in graph.initializer if x.data_type == TensorProto.FLOAT}
    if not any(_fits(node, constants) for node in graph.node):
        return []
    readers = _Readers(model)
    found: list[winograd.Convolution] = []
    rows = _Rows()
    # By the names of results.
    ends: dict[str, _Chain] = {}
    inside: set[str] = set()
    for node in graph.node:
        if _fits(node, constants):
            chain = readers.chain(node, inside)
            inside.update(one.output[0] for one in chain.nodes)
            ends[chain.nodes[-1].output[0]] = chain
        name = node.output[0]
        if name in ends:
            chain = ends[name]
            first = chain.nodes[0]
            weights, *bias = (numpy_helper.to_array(constants[name]) for name in first.input[1:])
            kernel = winograd.Convolution(weights, bias[0] if bias else None, chain.activation)
            sources = [first.input[0], *([chain.added] if chain.added else [])]
            rows.put(first.name, sources, name, len(found))
            found.append(kernel)
        elif name not in inside:
            rows.leave(node)
    rows.finish([output.name for output in graph.output])
    del graph.node[:]
    graph.node.extend(rows.nodes)
    if DOMAIN not in {x.domain for x in model.opset_import}:
        model.opset_import.append(helper.make_opsetid(DOMAIN, DOMAIN_VERSION))
    return found


class _Readers:
    """Who reads what in a graph, and the shapes of its values as far as they can be told."""

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = model.graph
        self._readers: dict[str, list[NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        self._results = {output.name for output in graph.output}
        known = onnx.shape_inference.infer_shapes(model).graph.value_info
        self._shapes = {
            x.name: [d.dim_value or d.dim_param for d in x.type.tensor_type.shape.dim]
            for x in known
        }

    def chain(self, conv: NodeProto, taken: set[str]) -> _Chain:
        """What a convolution can take along, less nodes that belong to another's chain."""
        following = self._only(conv)
        kinds = [x.op_type for x in following]
        if kinds == ["Add"] and following[0].output[0] not in taken:
            (join,) = following
            after = self._only(join)
            others = [name for name in join.input if name != conv.output[0]]
            if [x.op_type for x in after] == ["Relu"] and self._alike(conv.output[0], others):
                return _Chain(others[0], "relu", [conv, join, after[0]])
        if kinds == ["Relu"]:
            return _Chain(None, "relu", [conv, *following])
        if sorted(kinds) == ["Mul", "Sigmoid"]:
            sigmoid, product = sorted(following, key=lambda x: x.op_type, reverse=True)
            if self._only(sigmoid) == [product]:
                return _Chain(None, "silu", [conv, sigmoid, product])
        return _Chain(None, "none", [conv])

    def _only(self, node: NodeProto) -> list[NodeProto]:
        """All readers of a node's value, unless it is also a result of the graph."""
        name = node.output[0]
        return [] if name in self._results else self._readers.get(name, [])

    def _alike(self, name: str, others: list[str]) -> bool:
        """Whether there is one other value, of the same known shape."""
        if len(others) != 1 or name not in self._shapes:
            return False
        shape = self._shapes[name]
        return all(shape) and self._shapes.get(others[0]) == shape


class _Rows:
    """A graph some of whose values are rows of channels, ``[B, H, W, C]``, made maps on demand.

    Attributes:
        nodes: In order.
    """

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self._rows: dict[str, str] = {}
        self._maps: set[str] = set()

    def put(self, label: str, inputs: list[str], result: str, index: int) -> None:
        """Adds a node of ours, which reads and makes rows."""
        sources = [self._row(name) for name in inputs]
        self._rows[result] = f"{result}/rows"
        self.nodes.append(
            helper.make_node(
                OP_TYPE, sources, [self._rows[result]], label, domain=DOMAIN, index=index
            )
        )

    def leave(self, node: NodeProto) -> None:
        """Adds a node as it is, after maps of what it reads."""
        self.finish(node.input)
        self.nodes.append(node)

    def finish(self, names: Iterable[str]) -> None:
        """Makes maps of those values that are rows."""
        for name in names:
            if name in self._rows and name not in self._maps:
                self._maps.add(name)
                self._turn(self._rows[name], name, [0, 3, 1, 2])

    def _row(self, name: str) -> str:
        if name not in self._rows:
            self._rows[name] = f"{name}/rows"
            self._maps.add(name)
            self._turn(name, self._rows[name], [0, 2, 3, 1])
        return self._rows[name]

    def _turn(self, source: str, result: str, order: list[int]) -> None:
        self.nodes.append(
            helper.make_node("Transpose", [source], [result], f"{result}/turned", perm=order)
        )


def _fits(node: NodeProto, constants: dict[str, TensorProto]) -> bool:
    """Whether the kernel computes what a node says."""
    if node.op_type != "Conv" or node.domain not in ("", "ai.onnx"):
        return False
    if any(name not in constants for name in node.input[1:]):
        return False
    said = {x.name: _value(x) for x in node.attribute}
    # Without pads a convolution has none.
    if "pads" not in said or any(_WANTED.get(name) != value for name, value in said.items()):
        return False
    return winograd.takes(tuple(constants[node.input[1]].dims))


def _value(attribute: AttributeProto) -> Any:
    value = helper.get_attribute_value(attribute)
    return list(value) if attribute.type == AttributeProto.INTS else value


def conversion(
    convolutions: list[winograd.Convolution], operators: list[Any], threads: int | None
) -> Any:
    """Tells OpenVINO's reader to build our operator from each node of :func:`exchange`.

    Args:
        convolutions: What nodes count; read when a graph is read.
        operators: Takes every operator made, now or by copying; OpenVINO itself keeps none alive.
        threads: For the kernel.
    """
    from openvino.frontend.onnx import ConversionExtension

    operator = _operator()

    def convert(node: Any) -> Any:
        kernel = convolutions[node.get_attribute("index")]
        inputs = [node.get_input(i) for i in range(node.get_input_size())]
        return operator(inputs, kernel, threads, operators).outputs()

    return ConversionExtension(OP_TYPE, DOMAIN, convert)


@cache
def _operator() -> Any:
    """The operator's class; made here because its base comes with openvino."""
    import openvino

    class Convolution3x3(openvino.Op):  # type: ignore[misc]
        """A convolution of maps ``[B, H, W, C]``, see :class:`detr.winograd.Convolution`."""

        def __init__(
            self,
            inputs: Any,
            kernel: winograd.Convolution,
            threads: int | None,
            operators: list[Any],
        ) -> None:
            # A weak reference, as in :mod:`engines.openvino_engine`.
            super().__init__(weakref.proxy(self))
            operators.append(self)
            self.kernel, self.threads, self.operators = kernel, threads, operators
            self.set_arguments(inputs)
            self.constructor_validate_and_infer_types()

        def validate_and_infer_types(self) -> None:
            shape = self.get_input_partial_shape(0)
            sizes = [*(shape[i] for i in range(3)), openvino.Dimension(self.kernel.outputs)]
            self.set_output_type(0, self.get_input_element_type(0), openvino.PartialShape(sizes))

        def clone_with_new_inputs(self, new_inputs: Any) -> Any:
            return Convolution3x3(new_inputs, self.kernel, self.threads, self.operators)

        def visit_attributes(self, visitor: Any) -> bool:
            # By which two convolutions of one map are told apart.
            visitor.on_attributes({"kernel": str(id(self.kernel))})
            return True

        def has_evaluate(self) -> bool:
            return True

        def evaluate(self, outputs: Any, inputs: Any) -> bool:
            maps, *added = (tensor.data for tensor in inputs)
            self.kernel(maps, outputs[0].data, self.threads, added[0] if added else None)
            return True

    return Convolution3x3
