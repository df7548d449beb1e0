"""Types written into the graph: half precision with a single-precision island.

The result is strongly typed. Every cast is in the file, so TensorRT 10.13 and newer, TensorRT 11
(which knows nothing else) and ONNX Runtime compute one and the same thing, and no builder flag can
change it. A converter of our own rather than onnxconverter-common's, because the island has to be
named by what a part of a detector *does* (see :func:`part_names`), because operators that only move
data should not be typed on their own, which is where cast chains come from, and because the
attention function takes its values and its locations in different types.

Network inputs and outputs stay float32. Integers, booleans and shapes are not touched.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from engines.half_emulation import MOVERS
from engines.msda_function import AttentionSizes, Lowering, head_shape, set_lowering
from export.precision.node_kinds import Network, part_names, single_inputs

# Finite in half precision, with room for images that excite the network twice as much as those the
# ranges were measured on.
RANGE_LIMIT = 32752.0
# What the accuracy of a detection transformer is known to hang on (docs/precision.md).
DEFAULT_ISLAND = ("decode", "geometry", "locations", "norm", "refinement", "softmax")
Ranges = Mapping[str, float]


@dataclass(frozen=True)
class TypedGraph:
    """A graph with its types decided.

    Attributes:
        model: The graph.
        island: The parts that compute in float32, as :func:`part_names` names them; ``range:...``
            and ``exact:...`` are those that no search may take out.
    """

    model: ModelProto
    island: tuple[str, ...]


def in_island(part: str, island: Collection[str]) -> bool:
    """Whether an island has a part, by the part's own name or by its kind's."""
    return part in island or part.split(":")[0] in island


def to_half(
    model: ModelProto,
    island: Collection[str] = DEFAULT_ISLAND,
    ranges: Ranges | None = None,
    single: Collection[str] = (),
) -> TypedGraph:
    """Types a float32 graph as float16 but for an island.

    Args:
        model: A graph of :func:`export.trace.torch_to_onnx.export_graph`; left as it is.
        island: Parts, or kinds of parts, that compute in float32.
        ranges: Largest magnitude of each value on real images. What goes beyond half precision's
            range computes in float32 whatever the island says.
        single: Names of further nodes in float32: those of int8 pairs, which before opset 19 know
            no float16.

    Raises:
        ValueError: Values whose type the graph does not tell.
    """
    typed = ModelProto()
    typed.CopyFrom(model)
    network = Network(typed)
    parts = part_names(network)
    forced = _forced(network, ranges or {})
    full = {
        index
        for index, part in enumerate(parts)
        if index in forced
        or network.nodes[index].name in single
        or (part is not None and in_island(part, island))
    }
    half = _decide(network, full)
    _Rewriter(network, half).run()
    named = {p for p in parts if p is not None and in_island(p, island)}
    return TypedGraph(typed, tuple(sorted(_compact(named, parts) | set(forced.values()))))


def finish_half(model: ModelProto, sizes: AttentionSizes, lowering: Lowering) -> None:
    """Gives a typed graph an attention body of its types, and checks the whole."""
    set_lowering(model, head_shape(sizes), lowering)
    onnx.checker.check_model(model, full_check=True)


def _compact(kept: set[str], parts: list[str | None]) -> set[str]:
    """Writes a kind of which every part is kept as the kind alone."""
    present = {part for part in parts if part is not None}
    kinds = {part.split(":")[0] for part in kept}
    whole = {k for k in kinds if {p for p in present if p.split(":")[0] == k} <= kept}
    return whole | {part for part in kept if part.split(":")[0] not in whole}


def _forced(network: Network, ranges: Ranges) -> dict[int, str]:
    """Nodes that half precision cannot compute whatever the budget, with the name of the reason."""
    forced: dict[int, str] = {}
    exact: set[str] = set()
    for index, node in enumerate(network.nodes):
        data = [x for x in network.float_inputs(node) if x not in network.constants]
        from_integers = node.op_type == "Cast" and not network.is_float(node.input[0])
        if any(network.is_float(x) for x in node.output) and (
            from_integers or (data and all(x in exact for x in data))
        ):
            # Indices that pass through floats for a division: half precision ends at 2048.
            exact.update(node.output)
            forced[index] = _reason("exact", network.scope(node))
        elif node.op_type == "Cast" and data and data[0] in exact:
            continue
        elif any(ranges.get(x, 0.0) > RANGE_LIMIT for x in (*data, *node.output)) or any(
            _beyond_half(network.constants[x])
            for x in network.float_inputs(node)
            if x in network.constants
        ):
            forced[index] = _reason("range", network.scope(node))
    return forced


def _reason(kind: str, scope: str) -> str:
    return f"{kind}:{scope}" if scope else kind


def _beyond_half(tensor: TensorProto) -> bool:
    """Whether half precision turns a finite constant infinite, or a lone one into zero."""
    array = numpy_helper.to_array(tensor)
    finite = np.abs(array[np.isfinite(array)])
    if finite.size == 0:
        return False
    smallest = float(np.finfo(np.float16).smallest_subnormal)
    vanishes = array.size == 1 and 0 < finite.item() < smallest
    return bool(finite.max() > np.finfo(np.float16).max) or vanishes


def _decide(network: Network, full: set[int]) -> list[bool]:
    """Which nodes are half precision.

    A node that only moves data adds nothing by being in float32, except on the way from a float32
    result to a float32 reader, which would otherwise be rounded in between, and where it ranks a
    float32 result: rounded scores tie by the hundred, and ties go by place.
    """
    movers = {i for i, node in enumerate(network.nodes) if node.op_type in MOVERS and i not in full}
    comes_full = {value.name for value in network.graph.input}
    for index, node in enumerate(network.nodes):
        data = [x for x in network.float_inputs(node) if x not in network.constants]
        if index in full or (index in movers and (not data or any(x in comes_full for x in data))):
            comes_full.update(node.output)
    ranked = {
        x
        for i in movers
        if network.nodes[i].op_type == "TopK"
        for x in network.nodes[i].output
        if x in comes_full
    }
    wanted_full = {value.name for value in network.graph.output} | ranked
    for index in reversed(range(len(network.nodes))):
        node = network.nodes[index]
        if index in full or (index in movers and any(x in wanted_full for x in node.output)):
            wanted_full.update(network.float_inputs(node))
        else:
            wanted_full.update(node.input[i] for i in single_inputs(node) if i < len(node.input))
    half = []
    for index, node in enumerate(network.nodes):
        if index in movers:
            through = any(x in comes_full and x in wanted_full for x in node.output)
            half.append(not through)
        else:
            half.append(index not in full)
    return half


class _Rewriter:
    """Writes decided types into a graph, with one cast per value and type at most."""

    def __init__(self, network: Network, half: list[bool]) -> None:
        self._network, self._half = network, half
        self._outputs = {value.name for value in network.graph.output}
        self._is_half: dict[str, bool] = {}
        self._casts: dict[tuple[str, bool], str] = {}
        self._nodes: list[NodeProto] = []
        self._constants: dict[tuple[str, bool], None] = {}

    def run(self) -> None:
        network = self._network
        for node, half in zip(network.nodes, self._half, strict=True):
            self._retype(node, half)
        graph = network.graph
        del graph.node[:]
        graph.node.extend(self._nodes)
        self._write_constants()
        infos = [info for info in graph.value_info if info.name not in network.constants]
        for info in infos:
            if self._is_half.get(info.name, False):
                info.type.tensor_type.elem_type = TensorProto.FLOAT16
        del graph.value_info[:]
        graph.value_info.extend(infos)

    def _retype(self, node: NodeProto, half: bool) -> None:
        network, single = self._network, single_inputs(node)
        for slot, name in enumerate(node.input):
            if not network.is_float(name) or node.op_type == "Shape":
                continue
            wanted = half and slot not in single
            if name in network.constants:
                self._constants[name, wanted] = None
                # Renamed only when it is known whether both types are needed.
                node.input[slot] = _constant_name(name, wanted)
            elif self._is_half.get(name, False) != wanted and node.op_type != "Cast":
                node.input[slot] = self._cast(name, wanted)
        if node.op_type == "Cast" and half and network.is_float(node.output[0]):
            next(a for a in node.attribute if a.name == "to").i = TensorProto.FLOAT16
        self._nodes.append(node)
        for slot, name in enumerate(node.output):
            if not network.is_float(name):
                continue
            if half and name in self._outputs:
                node.output[slot] = self._note(name, f"{name}_fp16", True)
                self._nodes.append(_cast_node(node.output[slot], name, False))
            self._is_half[name] = half and name not in self._outputs

    def _cast(self, name: str, half: bool) -> str:
        if (name, half) not in self._casts:
            cast = self._note(name, f"{name}_{'fp16' if half else 'fp32'}", half)
            self._nodes.append(_cast_node(name, cast, half))
            self._casts[name, half] = cast
        return self._casts[name, half]

    def _note(self, like: str, name: str, half: bool) -> str:
        """Gives a new value the shape of another; returns its name."""
        info = onnx.ValueInfoProto()
        info.CopyFrom(self._network.infos[like])
        info.name = name
        info.type.tensor_type.elem_type = TensorProto.FLOAT16 if half else TensorProto.FLOAT
        self._network.graph.value_info.append(info)
        return name

    def _write_constants(self) -> None:
        graph, constants = self._network.graph, self._network.constants
        kept = [x for x in graph.initializer if x.name not in constants]
        final: dict[str, str] = {}
        for name, half in self._constants:
            # A weight keeps its name where one type is enough.
            shared = (name, not half) in self._constants
            new = f"{name}_fp16" if shared and half else name
            final[_constant_name(name, half)] = new
            array = numpy_helper.to_array(constants[name])
            kept.append(numpy_helper.from_array(array.astype(np.float16) if half else array, new))
        del graph.initializer[:]
        graph.initializer.extend(kept)
        for node in graph.node:
            for slot, name in enumerate(node.input):
                node.input[slot] = final.get(name, name)


def _constant_name(name: str, half: bool) -> str:
    """A name no graph has, until the final one is known."""
    return f"{name}\0{half}"


def _cast_node(source: str, target: str, half: bool) -> NodeProto:
    to = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    return helper.make_node("Cast", [source], [target], name=f"cast/{target}", to=to)
