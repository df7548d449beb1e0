"""Whether OpenVINO's 8-bit products are right on this processor.

Without instructions for them (AVX2, and AVX-512 without VNNI) OpenVINO adds pairs of products in 16
bits, which saturate without a word: a detector then loses detections. OpenVINO's documentation
advises 7-bit weights for such processors; that would cost digits on all others. So a product whose
sums saturate is tried, and where it comes out wrong, quantized layers are computed from the same
integers in float32.
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
