"""Where numbers go that a graph only moves: a chain of layout operators as one index map.

Exporters write the same tensor view in a dozen ways (Split or Slice, Unsqueeze and Concat or
Reshape). What they share is the result: each element of the output is a certain element of the
source. That map is found by sending the numbers 0, 1, 2, ... through the very nodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import permutations
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

Indices = npt.NDArray[np.int64]

# Operators that move numbers and change none; their first input is the data.
_MOVES = frozenset(
    ("Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose")
    + ("Unsqueeze",)
)


class Graph:
    """A static graph with look-ups in both directions.

    Args:
        model: With inferred shapes, every size known.
    """

    def __init__(self, model: ModelProto) -> None:
        self.model = model
        self.nodes = list(model.graph.node)
        self.opset = next(e.version for e in model.opset_import if e.domain == "")
        self.producer = {name: node for node in self.nodes for name in node.output if name}
        self.consumers: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                self.consumers.setdefault(name, []).append(node)
        self.outputs = {value.name for value in model.graph.output}
        self._constants = {x.name: x for x in model.graph.initializer}
        for node in self.nodes:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self._constants[node.output[0]] = node.attribute[0].t
        self._shapes: dict[str, tuple[int, ...]] = {}
        for value in [*model.graph.value_info, *model.graph.input, *model.graph.output]:
            if value.type.tensor_type.HasField("shape"):
                sizes = value.type.tensor_type.shape.dim
                if all(size.HasField("dim_value") for size in sizes):
                    self._shapes[value.name] = tuple(size.dim_value for size in sizes)

    def constant(self, name: str) -> npt.NDArray[np.generic] | None:
        """The value of a constant, or ``None``."""
        tensor = self._constants.get(name)
        return None if tensor is None else np.asarray(numpy_helper.to_array(tensor))

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a value.

        Raises:
            LookupError: It is not known.
        """
        if name in self._constants:
            return tuple(self._constants[name].dims)
        return self._shapes[name]

    def moves(self, node: NodeProto) -> bool:
        """Whether a node only moves its first input's numbers."""
        return node.op_type in _MOVES and all(
            name in self._constants for name in node.input[1:] if name
        )

    def source(self, name: str) -> tuple[str, list[NodeProto]]:
        """Walks back over nodes that only move numbers.

        Returns:
            The value they start from, and the nodes in order.
        """
        path: list[NodeProto] = []
        while (node := self.producer.get(name)) is not None and self.moves(node):
            path.append(node)
            name = node.input[0]
        return name, path[::-1]

    def only_consumer(self, name: str) -> NodeProto | None:
        """The one node that reads a value; ``None`` for several, or a graph's output."""
        readers = self.consumers.get(name, [])
        return readers[0] if len(readers) == 1 and name not in self.outputs else None

    def index_map(
        self, sources: Mapping[str, Indices], nodes: Iterable[NodeProto], target: str
    ) -> Indices:
        """The numbers of ``sources`` where ``nodes`` leave them in ``target``."""
        nodes = _unique(nodes)
        made = {name for node in nodes for name in node.output}
        needed = {name for node in nodes for name in node.input if name} - made - set(sources)
        if target in sources:
            return sources[target]
        graph = helper.make_graph(
            nodes,
            "layout",
            [
                helper.make_tensor_value_info(n, TensorProto.INT64, x.shape)
                for n, x in sources.items()
            ],
            [helper.make_tensor_value_info(target, TensorProto.INT64, None)],
            [_named(self._constants[name], name) for name in needed],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)])
        found: Sequence[Any] = list(ReferenceEvaluator(model).run([target], dict(sources)))
        return np.asarray(found[0], dtype=np.int64)


def _unique(nodes: Iterable[NodeProto]) -> list[NodeProto]:
    return list({id(node): node for node in nodes}.values())


def _named(tensor: TensorProto, name: str) -> TensorProto:
    named = onnx.TensorProto()
    named.CopyFrom(tensor)
    named.name = name
    return named


def counted(shape: Sequence[int], start: int = 0) -> Indices:
    """The numbers from ``start`` on in a shape."""
    return np.arange(start, start + int(np.prod(shape)), dtype=np.int64).reshape(shape)


def transposition(wanted: Indices, shape: Sequence[int]) -> tuple[int, ...] | None:
    """The permutation of a tensor's axes that puts its elements in a wanted order.

    Args:
        wanted: For each element in order, its index in the tensor.
        shape: Of the tensor; axes of size 1 stay where they are.

    Returns:
        ``None`` where there is none.
    """
    if wanted.size != int(np.prod(shape)):
        return None
    flat, numbers = wanted.reshape(-1), counted(shape)
    real = [axis for axis, size in enumerate(shape) if size > 1]
    if len(real) > 6:
        return None
    for order in permutations(real):
        moved = iter(order)
        perm = tuple(next(moved) if size > 1 else axis for axis, size in enumerate(shape))
        if np.array_equal(numbers.transpose(perm).reshape(-1), flat):
            return perm
    return None
