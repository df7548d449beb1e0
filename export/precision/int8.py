"""INT8 as explicit Q/DQ pairs: what TensorRT, OpenVINO and ONNX Runtime all read from the graph.

Symmetric with zero point 0; weights per output channel and stored as int8, activations per tensor.
A pair sits on the inputs of convolutions and of matrix products with a weight, and nowhere else:
not on norms, softmax, attention products, sampling locations or attention weights, not on the
network's first convolution, heads or reference embeddings. A pass of our own: ONNX Runtime's
quantizer stores biases as int32 behind a DequantizeLinear, which TensorRT refuses, and it cannot be
told of the parts of a detector.

Scales minimize the mean squared error over a histogram of each activation on real images, which
for a heavy tail clips less of the body's resolution away than the maximum does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from detr.cli_support import progress
from detr.data.preprocess import PreprocessConfig, preprocess
from detr.types import FloatArray, ImageArray
from engines.ort_engine import open_session
from export.precision.half import Ranges
from export.precision.node_kinds import Network, part_names
from export.precision.ranges import fill

_BINS = 2048
_LEVELS = 127
# Bytes of activations handed out of one run: each run costs a whole pass, all at once could be
# several GB.
_AT_ONCE = 1 << 30
# Elements counted at a time, so that what is made on the way stays in cache.
_BLOCK = 1 << 16
# They steer where and how strongly attention looks.
_STEERING = ("sampling_offsets", "attention_weights")
Histogram = npt.NDArray[np.float64]


def quantized_nodes(network: Network) -> list[int]:
    """Convolutions and matrix products that INT8 is for, by index."""
    network_inputs = {value.name for value in network.graph.input}
    chosen = []
    for index, (node, part) in enumerate(zip(network.nodes, part_names(network), strict=True)):
        if node.op_type not in ("Conv", "MatMul") or not (part or "").startswith("module:"):
            continue
        module = network.scope(node)
        weight = _weight(network, node)
        # A product with a constant of more axes is attention, the values of which follow from the
        # weights alone, as those of content queries before the first layer do.
        weighted = weight is not None and (node.op_type == "Conv" or weight.ndim == 2)
        first = node.input[0] in network_inputs
        steering = module.split(".")[-1] in _STEERING
        if weighted and not first and not steering and not module.startswith("source.reference"):
            chosen.append(index)
    return chosen


def calibrate(
    model: ModelProto,
    images: Sequence[ImageArray],
    config: PreprocessConfig,
    batch: int,
    ranges: Ranges,
) -> dict[str, float]:
    """Scale of every activation that is quantized.

    Args:
        model: A float32 graph; left as it is.
        images: ``[h, w, 3]`` uint8 RGB, real ones.
        config: How the model wants its images.
        batch: Images per run.
        ranges: Largest magnitude of each value on these images.
    """
    probed = ModelProto()
    probed.CopyFrom(model)
    network = Network(probed)
    names = sorted({network.nodes[i].input[0] for i in quantized_nodes(network)})
    known = {value.name for value in probed.graph.output}
    probed.graph.output.extend(network.infos[name] for name in names if name not in known)
    session = open_session(probed)
    histograms = {name: np.zeros(_BINS) for name in names}
    groups = _groups(network, names, batch)
    for start in progress(range(0, len(images), batch), "calibrating"):
        feed = vars(preprocess(fill(images[start : start + batch], batch), config))
        for some in groups:
            for name, array in zip(some, session.run(some, feed), strict=True):
                histograms[name] += _histogram(array, ranges[name])
    return {name: _best_scale(histograms[name], ranges[name]) for name in names}


def _groups(network: Network, names: Sequence[str], batch: int) -> list[list[str]]:
    """Activations in groups small enough to be held at once."""
    groups: list[list[str]] = [[]]
    held = 0
    for name in names:
        shape = network.infos[name].type.tensor_type.shape
        size = 4 * math.prod(d.dim_value if d.HasField("dim_value") else batch for d in shape.dim)
        if groups[-1] and held + size > _AT_ONCE:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return groups


def _histogram(array: FloatArray, top: float) -> Histogram:
    """Magnitudes from 0 to ``top``, counted in bins of one width."""
    counts = np.zeros(_BINS)
    flat = array.reshape(-1)
    per_bin = np.float32(_BINS / max(top, 1e-12))
    for start in range(0, flat.size, _BLOCK):
        position = np.abs(flat[start : start + _BLOCK])
        position *= per_bin
        bins = np.minimum(position, np.float32(_BINS - 1)).astype(np.intp)
        counts += np.bincount(bins, minlength=_BINS)
    return counts


def _best_scale(counts: Histogram, top: float) -> float:
    """The scale with the least mean squared error for a histogram of magnitudes up to ``top``."""
    if top <= 0:
        return 1.0
    centers = (np.arange(_BINS) + 0.5) * (top / _BINS)
    best, least = top, np.inf
    for limit in np.linspace(0.1, 1.0, 91) * top:
        step = limit / _LEVELS
        error = centers - np.minimum(np.round(centers / step), _LEVELS) * step
        loss = float((counts * error**2).sum())
        if loss < least:
            best, least = float(limit), loss
    return best / _LEVELS


def quantize(model: ModelProto, scales: Mapping[str, float]) -> set[str]:
    """Puts Q/DQ pairs into a float32 graph, in place.

    Args:
        model: A graph of :func:`export.trace.torch_to_onnx.export_graph`.
        scales: See :func:`calibrate`.

    Returns:
        Names of the nodes that compute in int8 and of their Q and DQ nodes.
    """
    network = Network(model)
    pass_ = _Pass(network, scales)
    for index in quantized_nodes(network):
        pass_.quantize(index)
    pass_.write()
    return pass_.touched


class _Pass:
    def __init__(self, network: Network, scales: Mapping[str, float]) -> None:
        self._network, self._scales = network, scales
        self.touched: set[str] = set()
        self._before: dict[int, list[NodeProto]] = {}
        self._pairs: dict[str, str] = {}
        self._weights: dict[str, str] = {}
        self._new: list[TensorProto] = []
        self._zero = self._initializer("int8/zero", np.array(0, np.int8))

    def quantize(self, index: int) -> None:
        node = self._network.nodes[index]
        self.touched.add(node.name)
        node.input[0] = self._activation(node.input[0], index)
        node.input[1] = self._weight(node, index)

    def write(self) -> None:
        graph = self._network.graph
        nodes = [
            new
            for index, node in enumerate(self._network.nodes)
            for new in (*self._before.get(index, []), node)
        ]
        read = {name for node in nodes for name in node.input}
        # The transposition of a weight that is stored as int8 has no reader left.
        nodes = [x for x in nodes if x.op_type != "Transpose" or x.output[0] in read]
        del graph.node[:]
        graph.node.extend(nodes)
        read = {name for node in nodes for name in node.input}
        kept = [tensor for tensor in graph.initializer if tensor.name in read]
        del graph.initializer[:]
        graph.initializer.extend([*kept, *self._new])

    def _activation(self, name: str, position: int) -> str:
        if name not in self._pairs:
            scale = self._initializer(f"{name}/scale", np.array(self._scales[name], np.float32))
            integers, back = f"{name}/int8", f"{name}/dequantized"
            like = self._network.infos[name].type.tensor_type.shape
            self._add("QuantizeLinear", [name, scale, self._zero], integers, position, like)
            self._add("DequantizeLinear", [integers, scale, self._zero], back, position, like)
            self._pairs[name] = back
        return self._pairs[name]

    def _weight(self, node: NodeProto, position: int) -> str:
        name = node.input[1]
        if name not in self._weights:
            array = _weight(self._network, node)
            assert array is not None
            axis = 0 if node.op_type == "Conv" else array.ndim - 1
            others = tuple(i for i in range(array.ndim) if i != axis)
            largest = np.abs(array).max(axis=others)
            scale = (np.where(largest > 0, largest, 1.0) / _LEVELS).astype(np.float32)
            shape = [-1 if i == axis else 1 for i in range(array.ndim)]
            integers = np.round(array / scale.reshape(shape)).clip(-_LEVELS, _LEVELS)
            inputs = [
                self._initializer(f"{name}/int8", integers.astype(np.int8)),
                self._initializer(f"{name}/scale", scale),
                self._initializer(f"{name}/zero", np.zeros(scale.shape, np.int8)),
            ]
            back = f"{name}/dequantized"
            info = helper.make_tensor_value_info(back, TensorProto.FLOAT, array.shape)
            self._add(
                "DequantizeLinear", inputs, back, position, info.type.tensor_type.shape, axis=axis
            )
            self._weights[name] = back
        return self._weights[name]

    def _add(
        self,
        op_type: str,
        inputs: list[str],
        output: str,
        position: int,
        shape: onnx.TensorShapeProto,
        axis: int | None = None,
    ) -> None:
        scope = self._network.scope(self._network.nodes[position])
        name = f"{scope}/{op_type}_{output.replace('/', '.')}"
        node = helper.make_node(op_type, inputs, [output], name=name, axis=axis)
        self.touched.add(name)
        self._before.setdefault(position, []).append(node)
        kind = TensorProto.INT8 if op_type == "QuantizeLinear" else TensorProto.FLOAT
        info = helper.make_tensor_value_info(output, kind, None)
        info.type.tensor_type.shape.CopyFrom(shape)
        self._network.graph.value_info.append(info)

    def _initializer(self, name: str, array: npt.NDArray[np.generic]) -> str:
        self._new.append(numpy_helper.from_array(array, name))
        return name


def _weight(network: Network, node: NodeProto) -> FloatArray | None:
    """The constant a node multiplies with, seen through a transposition; else ``None``."""
    name = node.input[1]
    if name in network.constants:
        return numpy_helper.to_array(network.constants[name])
    maker = network.producers.get(name)
    if maker is None or network.nodes[maker].op_type != "Transpose":
        return None
    source = network.nodes[maker]
    if source.input[0] not in network.constants:
        return None
    order = next((list(a.ints) for a in source.attribute if a.name == "perm"), None)
    weight: FloatArray = numpy_helper.to_array(network.constants[source.input[0]])
    turned: FloatArray = weight.transpose(order)
    return turned
