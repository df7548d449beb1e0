"""Where in the graph an engine first leaves its reference.

Every torch module shows in an exported graph as a run of nodes named ``MODULE/OPERATION``. The
values with which modules end are compared one by one in the order of the graph; where the reference
is torch, its side comes from hooks on the very modules. The first value that differs, less the
nodes behind values that agree, leaves a handful of nodes, and they have names.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from detr.data.preprocess import Inputs
from detr.types import ImageArray
from engines.base import Engine
from engines.bundle import Bundle, Precision
from engines.torch_engine import TorchEngine
from engines.verdict import Deviation

Array = npt.NDArray[Any]

# Difference over the root mean square of the value: what rounding leaves by the end of a deep
# network stays well below, a wrong layer does not. The largest difference, but of int8 its root
# mean square: scales clip the tail of a value on purpose, so single elements may be anywhere.
TOLERANCE = {"fp32": 1e-3, "fp16": 0.1, "int8": 0.25}
# Rows of a value are compared in any order up to this many; more are tokens, whose order is fixed.
_MOST_ROWS = 1000
_QUANTIZATION = {"QuantizeLinear", "DequantizeLinear"}


@dataclass(frozen=True)
class Boundary:
    """The value a module ends with.

    Attributes:
        module: Name of the module.
        call: Which of its calls, from 0.
        value: Name of the value in the graph.
    """

    module: str
    call: int
    value: str


def boundaries(graph: onnx.GraphProto) -> list[Boundary]:
    """The values with which modules end, in the order of the graph.

    Only modules without submodules in the graph, and only where all calls of a module end in one
    value each, so that they can be told apart.
    """
    readers: dict[str, list[int]] = {}
    for position, node in enumerate(graph.node):
        for name in node.input:
            readers.setdefault(name, []).append(position)
    outputs = {output.name for output in graph.output}
    modules = [node.name.rpartition("/")[0] for node in graph.node]
    ends = []
    calls: dict[str, int] = {}
    unclear = set()
    for module, run in groupby(range(len(modules)), key=modules.__getitem__):
        if not module:
            continue
        inside = set(run)
        leaving = [
            name
            for position in sorted(inside)
            for name in graph.node[position].output
            # A pair before a product is called after that product's module and has other readers.
            if graph.node[position].op_type not in _QUANTIZATION
            and (name in outputs or not inside.issuperset(readers.get(name, [])))
        ]
        call = calls[module] = calls.get(module, -1) + 1
        if len(leaving) == 1:
            ends.append(Boundary(module, call, leaving[0]))
        else:
            unclear.add(module)
    parents = {module[:end] for module in calls for end, c in enumerate(module) if c == "."}
    return [boundary for boundary in ends if boundary.module not in parents | unclear]


def torch_values(engine: TorchEngine, inputs: Inputs, ends: Sequence[Boundary]) -> dict[str, Array]:
    """What the torch modules end with, by the name the value has in the graph.

    A module that was called another number of times than the graph shows is left out. The modules
    are those the graph was traced from, some of which end with other values than in training.
    """
    from detr.models.fusing import fused

    traced = copy.copy(engine)
    traced.detector = fused(engine.detector)
    recorded: dict[str, list[Array]] = {boundary.module: [] for boundary in ends}
    handles = []
    for name, module in traced.detector.named_modules():
        if name in recorded:
            handles.append(module.register_forward_hook(_recorder(recorded[name])))
    try:
        traced.run(inputs)
    finally:
        for handle in handles:
            handle.remove()
    calls = {b.module: sum(other.module == b.module for other in ends) for b in ends}
    return {
        b.value: recorded[b.module][b.call]
        for b in ends
        if len(recorded[b.module]) == calls[b.module]
    }


def _recorder(into: list[Array]) -> Callable[[Any, Any, Any], None]:
    def record(_module: Any, _inputs: Any, output: Any) -> None:
        if hasattr(output, "numpy"):
            into.append(output.detach().cpu().numpy().copy())

    return record


def first_deviation(
    bundle: Bundle, reference: Engine, engine: Engine, image: ImageArray
) -> Deviation | None:
    """The first layer in which an engine leaves its reference, on one image.

    Args:
        bundle: Where the engine comes from.
        reference: The torch model, or an engine that can be asked for intermediate values.
        engine: Likewise.
        image: One on which the two differ.

    Returns:
        ``None`` where either side does not show intermediate values.
    """
    model = onnx.load(str(bundle.model))
    ends = boundaries(model.graph)
    inputs = reference.prepare([image] * (engine.batch_size or 1))
    names = [boundary.value for boundary in ends]
    candidate = engine.intermediates(inputs, names)
    if candidate is None:
        return None
    if isinstance(reference, TorchEngine):
        expected: Mapping[str, Array] | None = torch_values(reference, inputs, ends)
    else:
        expected = reference.intermediates(inputs, names)
    if expected is None:
        return None
    return compare_values(model.graph, expected, candidate, bundle.info.precision)


def compare_values(
    graph: onnx.GraphProto,
    expected: Mapping[str, Array],
    candidate: Mapping[str, Array],
    precision: Precision,
) -> Deviation:
    """Compares intermediate values.

    Args:
        graph: The graph both belong to.
        expected: The reference's values by name.
        candidate: The engine's; what only one of them has, or in another shape, is left out.
        precision: Types of the graph, which say what is a deviation.
    """
    tolerance = TOLERANCE[precision]
    agreed: list[str] = []
    before = 0.0
    order = [name for node in graph.node for name in node.output]
    for name in order:
        if name not in expected or name not in candidate:
            continue
        if expected[name].shape != candidate[name].shape:
            continue
        error = difference(expected[name], candidate[name], precision)
        if not error <= tolerance:
            nodes = _between(graph, name, agreed)
            layer = _layer(nodes)
            return Deviation(
                layer=layer,
                outside=any(not node.name.startswith(layer) for node in nodes),
                operators=_operators(nodes),
                error=error,
                before=before,
                compared=len(agreed) + 1,
            )
        agreed.append(name)
        before = max(before, error)
    # The values agree to the end; whether the outputs do is what brought us here.
    return Deviation(
        layer="decode" if before <= tolerance / 10 else "",
        operators=_operators(_between(graph, None, agreed)),
        error=before,
        before=before,
        compared=len(agreed),
    )


def _operators(nodes: Sequence[onnx.NodeProto]) -> tuple[str, ...]:
    return tuple(sorted({node.op_type for node in nodes}))


def difference(expected: Array, candidate: Array, precision: Precision = "fp32") -> float:
    """Difference (see :data:`TOLERANCE`) over the root mean square of what is expected.

    A NaN is infinitely far. Rows of queries (``[B, N, D]``) may be in another order: proposals with
    equal scores trade places.
    """
    if not expected.size:
        return 0.0
    a, b = expected.astype(np.float64), candidate.astype(np.float64)
    usable = np.isfinite(a)
    if not usable.any():
        return 0.0
    scale = _root_mean_square(a[usable]) or 1.0
    size = _root_mean_square if precision == "int8" else _largest
    plain = size(a[usable] - b[usable]) / scale
    ordered = a.ndim != 3 or a.shape[1] > _MOST_ROWS
    if plain <= TOLERANCE[precision] or ordered or not usable.all():
        return plain
    return min(plain, size(_gap_in_any_order(a, b)) / scale)


def _largest(gap: Array) -> float:
    return float(np.abs(gap).max()) if np.isfinite(gap).all() else float("inf")


def _root_mean_square(gap: Array) -> float:
    return float(np.sqrt(np.mean(np.square(gap)))) if np.isfinite(gap).all() else float("inf")


def _gap_in_any_order(a: Array, b: Array) -> Array:
    """Differences after each row of ``b`` went to the nearest row of ``a``; else infinite."""
    if not np.isfinite(b).all():
        return np.array(np.inf)
    gaps = []
    for x, y in zip(a, b, strict=True):
        squares = np.square(x).sum(1)[:, None] + np.square(y).sum(1)[None] - 2 * x @ y.T
        nearest = squares.argmin(0)
        if len(set(nearest.tolist())) < len(nearest):
            return np.array(np.inf)
        gaps.append(x[nearest] - y)
    return np.stack(gaps)


def _between(
    graph: onnx.GraphProto, name: str | None, agreed: Sequence[str]
) -> list[onnx.NodeProto]:
    """The nodes a value (the outputs, where ``None``) is computed by from values that agree."""
    producers = {output: node for node in graph.node for output in node.output}
    known = set(agreed)
    stack = [output.name for output in graph.output] if name is None else [name]
    taken: dict[int, onnx.NodeProto] = {}
    while stack:
        wanted = stack.pop()
        node = producers.get(wanted)
        if node is not None and wanted not in known and id(node) not in taken:
            taken[id(node)] = node
            stack.extend(node.input)
    return [node for node in graph.node if id(node) in taken]


def _layer(nodes: Sequence[onnx.NodeProto]) -> str:
    """The module around the nodes that belong to the same part of the network as the last one."""
    last = nodes[-1].name.rpartition("/")[0]
    modules = [node.name.rpartition("/")[0] for node in nodes]
    parent = last.rpartition(".")[0]
    # Several leaves of one parent, or nodes of the parent's own: the fault may be any of them.
    if parent and any(m == parent or (m != last and m.startswith(parent + ".")) for m in modules):
        return parent
    return last
