"""What OpenVINO's 8-bit products need to be right on this processor.

Without instructions for them (AVX2, and AVX-512 without VNNI) OpenVINO adds pairs of products in 16
bits, which saturate without a word: a detector then loses detections. OpenVINO's documentation
advises 7-bit weights for such processors; that would cost digits on all others. So a product whose
sums saturate is tried, and where it comes out wrong, quantized layers are computed from the same
integers in float32.

With such instructions another thing goes wrong (2026.4): a signed quantization after a
concatenation, as before every convolution that fuses maps, loses its scale, and values come out
rounded to whole numbers. The same integers counted from 128 as unsigned ones are right.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

# Compute what lies between Q/DQ pairs in the types the graph is left with.
IN_FLOAT = {"LP_TRANSFORMS_MODE": "NO"}
_SIDE, _SCALE = 64, 0.01


def quantized(model: onnx.ModelProto) -> bool:
    """Whether a graph has integers to compute with."""
    return any(node.op_type == "QuantizeLinear" for node in model.graph.node)


def count_from_128(model: onnx.ModelProto) -> None:
    """Makes signed activations of a graph unsigned: other integers for the very same values."""
    graph = model.graph
    known = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    pairs = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    made = {node.output[0] for node in pairs}
    pairs += [x for x in graph.node if x.op_type == "DequantizeLinear" and x.input[0] in made]
    zeros = {node.input[2] for node in pairs}
    signed = {name for name in zeros if known[name].dtype == np.int8 and not known[name].any()}
    for name in signed:
        middle = np.full_like(known[name], 128, np.uint8)
        graph.initializer.append(numpy_helper.from_array(middle, f"{name}/from_128"))
    for node in pairs:
        if node.input[2] in signed:
            node.input[2] += "/from_128"
    # What is left says that they are signed.
    told = [one for one in graph.value_info if one.name not in made]
    del graph.value_info[:]
    graph.value_info.extend(told)


@cache
def sums_saturate() -> bool:
    """Whether a product of 8-bit integers at the end of their range is wrong here."""
    import openvino

    compiled = openvino.Core().compile_model(
        openvino.Core().read_model(_product().SerializeToString()),
        "CPU",
        {"INFERENCE_PRECISION_HINT": "f32"},
    )
    largest = np.full((_SIDE, _SIDE), 127 * _SCALE, np.float32)
    wanted = _SIDE * (127 * _SCALE) ** 2
    found: Any = compiled(largest)[0]
    return bool(np.abs(found - wanted).max() > 1e-3 * wanted)


def _product() -> onnx.ModelProto:
    """A matrix times one of 127s, as the exporter writes quantized products."""
    constants = {
        "scale": np.float32(_SCALE),
        "zero": np.int8(0),
        "integers": np.full((_SIDE, _SIDE), 127, np.int8),
        "scales": np.full(_SIDE, _SCALE, np.float32),
        "zeros": np.zeros(_SIDE, np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["quantized"]),
        helper.make_node("DequantizeLinear", ["quantized", "scale", "zero"], ["back"]),
        helper.make_node("DequantizeLinear", ["integers", "scales", "zeros"], ["weight"], axis=1),
        helper.make_node("MatMul", ["back", "weight"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [_SIDE, _SIDE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [_SIDE, _SIDE])],
        [numpy_helper.from_array(np.asarray(x), name) for name, x in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
