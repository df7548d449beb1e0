"""What each node of an exported detector does, in words an island can be written in.

A part is ``kind:module``, for example ``norm:encoder.layers.0.norm``:

* ``norm``: statistics and scale of layer, group and instance norms, with the residual sum they read
* ``softmax``: attention weights of either kind
* ``locations``: from sampling offsets to sampling locations
* ``geometry``: everything that follows from the image's size alone: valid ratios, sine positions,
  masks, default boxes
* ``refinement``: box heads and the references they move, with their sine embedding
* ``masks``: what queries and pixels say of masks, which is multiplied
* ``decode``: class heads, ranking, the boxes in pixels and the masks of what was ranked
* ``module``: the rest: convolutions, projections, attention, feed-forward networks
"""

from __future__ import annotations

from collections import defaultdict

import onnx
from onnx import ModelProto, NodeProto, TensorProto

from engines.half_emulation import MOVERS
from engines.msda_function import is_attention

_NORMS = {"LayerNormalization", "InstanceNormalization"}
# No part of their own: they take any type, or go with the node they serve.
_UNTYPED = {"Shape", "QuantizeLinear", "DequantizeLinear"}
_FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16}


def single_inputs(node: NodeProto) -> tuple[int, ...]:
    """Inputs that are float32 whatever type a node's data has.

    Locations and weights of an attention, and the scales of a Resize.
    """
    if is_attention(node):
        return (1, 2)
    return (2,) if node.op_type == "Resize" else ()


class Network:
    """A graph with what the passes over it look up.

    Attributes:
        graph: The graph.
        nodes: Its nodes in order.
        infos: Type and shape of every value.
        constants: Its float initializers.
        producers: Node of each value, by index.
        consumers: Nodes reading each value, by index.

    Raises:
        ValueError: The graph does not tell the type of a value.
    """

    def __init__(self, model: ModelProto) -> None:
        self.graph = model.graph
        self.nodes = list(model.graph.node)
        self.infos = _infos(model)
        weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self.constants = {n: t for n, t in weights.items() if t.data_type in _FLOATS}
        self.producers: dict[str, int] = {}
        self.consumers: defaultdict[str, list[int]] = defaultdict(list)
        for index, node in enumerate(self.nodes):
            self.producers |= dict.fromkeys(node.output, index)
            for name in node.input:
                self.consumers[name].append(index)
            for name in node.output:
                if name and name not in self.infos:
                    raise ValueError(f"the graph does not tell the type of {name}")

    def is_float(self, name: str) -> bool:
        if name in self.constants:
            return True
        return name in self.infos and self.infos[name].type.tensor_type.elem_type in _FLOATS

    def float_inputs(self, node: NodeProto) -> list[str]:
        return [name for name in node.input if self.is_float(name)]

    @staticmethod
    def scope(node: NodeProto) -> str:
        """The module a node belongs to; empty for the detector itself."""
        return node.name.rpartition("/")[0]

    def reached(self, start: str) -> set[int]:
        """Nodes that depend on a value."""
        found: set[int] = set()
        stack = [start]
        while stack:
            for index in self.consumers.get(stack.pop(), []):
                if index not in found:
                    found.add(index)
                    stack.extend(self.nodes[index].output)
        return found

    def before(self, name: str, scope: str) -> set[int]:
        """Nodes within one module that a value is computed from."""
        found: set[int] = set()
        stack = [name]
        while stack:
            index = self.producers.get(stack.pop())
            if index is not None and index not in found and self.scope(self.nodes[index]) == scope:
                found.add(index)
                stack.extend(self.nodes[index].input)
        return found


def _infos(model: ModelProto) -> dict[str, onnx.ValueInfoProto]:
    graph = model.graph
    return {info.name: info for info in [*graph.value_info, *graph.input, *graph.output]}


def part_names(network: Network) -> list[str | None]:
    """The part each node belongs to; ``None`` for nodes that move data or compute no floats."""
    seen = network.reached("images")
    norms = _norms(network)
    locations = _locations(network)
    names: list[str | None] = []
    for index, node in enumerate(network.nodes):
        scope = network.scope(node)
        silent = node.op_type in MOVERS or node.op_type in _UNTYPED
        if silent or not network.float_inputs(node):
            names.append(None)
            continue
        if index in norms:
            kind, scope = "norm", norms[index]
        elif node.op_type == "Softmax":
            kind = "softmax"
        elif index not in seen:
            kind = "geometry"
        elif index in locations:
            kind = "locations"
        else:
            kind = _kind_by_module(scope)
        names.append(f"{kind}:{scope}" if scope else kind)
    return names


def _kind_by_module(scope: str) -> str:
    path = scope.split(".")
    if not scope or "class_heads" in path or "class_head" in path:
        return "decode"
    heads = bool({"box_heads", "box_head", "refiner"} & set(path))
    if heads or scope in ("decoder", "source", "source.proposals"):
        return "refinement"
    if "mask_heads" in path or scope == "pixels.project":
        return "masks"
    return "module"


def _norms(network: Network) -> dict[int, str]:
    """Nodes of norms and the sums they read, with the norm's module."""
    found: dict[int, str] = {}
    # A group norm is an instance norm with its scale applied afterwards, in one module.
    scopes = {network.scope(node) for node in network.nodes if node.op_type in _NORMS}
    for index, node in enumerate(network.nodes):
        scope = network.scope(node)
        if scope not in scopes:
            continue
        found[index] = scope
        source = network.producers.get(node.input[0]) if node.op_type in _NORMS else None
        if source is not None and network.nodes[source].op_type == "Add":
            found[source] = scope
    return found


def _locations(network: Network) -> set[int]:
    found: set[int] = set()
    for node in network.nodes:
        if is_attention(node):
            found |= network.before(node.input[1], network.scope(node))
    return found
