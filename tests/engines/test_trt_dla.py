"""Backbone and neck on a Jetson's accelerator: which nodes they are, and what TensorRT is told."""

from __future__ import annotations

import types
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from detr.errors import UserError
from engines.trt import dla


def graph() -> onnx.ModelProto:
    """A small detector: a quantized convolution, a residual, a neck, tokens, attention."""
    import numpy as np

    node = helper.make_node
    nodes = [
        node("QuantizeLinear", ["w1", "s", "z"], ["w1_q"], "quantize weight"),
        node("DequantizeLinear", ["w1_q", "s", "z"], ["w1_d"], "dequantize weight"),
        node("QuantizeLinear", ["images", "s", "z"], ["images_q"], "quantize images"),
        node("DequantizeLinear", ["images_q", "s", "z"], ["images_d"], "dequantize images"),
        node("Conv", ["images_d", "w1_d"], ["c2"], "backbone conv"),
        node("Relu", ["c2"], ["r2"], "backbone relu"),
        node("Add", ["r2", "c2"], ["c3"], "backbone add"),
        node("Conv", ["c3", "w2"], ["level"], "neck conv"),
        node("Reshape", ["level", "flat"], ["rows"], "to tokens"),
        node("Transpose", ["rows"], ["tokens"], "turn", perm=[0, 2, 1]),
        node("MatMul", ["tokens", "w3"], ["hidden"], "encoder"),
        node("Relu", ["hidden"], ["active"], "encoder relu"),
        node("Mul", ["active", "valid"], ["out"], "mask"),
    ]
    arrays = {
        "w1": np.zeros((3, 3, 1, 1), np.float32),
        "w2": np.zeros((3, 3, 1, 1), np.float32),
        "w3": np.zeros((3, 3), np.float32),
        "s": np.array(1.0, np.float32),
        "z": np.array(0, np.int8),
        "flat": np.array([0, 3, -1], np.int64),
    }
    value = helper.make_tensor_value_info
    return helper.make_model(
        helper.make_graph(
            nodes,
            "detector",
            [
                value("images", TensorProto.FLOAT, [1, 3, 4, 4]),
                value("valid", TensorProto.FLOAT, [1, 16, 1]),
            ],
            [value("out", TensorProto.FLOAT, [1, 16, 3])],
            [numpy_helper.from_array(array, name) for name, array in arrays.items()],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
    )


FRONT = [
    "quantize images",
    "dequantize images",
    "backbone conv",
    "backbone relu",
    "backbone add",
    "neck conv",
]


def test_the_front_ends_where_maps_become_tokens() -> None:
    model = graph()
    onnx.checker.check_model(model)
    assert dla.front(model) == FRONT


class Config:
    def __init__(self, can: set[str]) -> None:
        self.can, self.flags, self.devices = can, [], {}  # type: ignore[var-annotated]
        self.default_device_type = self.DLA_core = None

    def set_flag(self, flag: Any) -> None:
        self.flags.append(flag)

    def can_run_on_DLA(self, layer: Any) -> bool:
        return layer.name in self.can

    def set_device_type(self, layer: Any, device: Any) -> None:
        assert self.default_device_type == "GPU", "layers nobody places belong to the GPU"
        self.devices[layer.name] = device


TRT = types.SimpleNamespace(
    __version__="11.4.1",
    BuilderFlag=types.SimpleNamespace(GPU_FALLBACK="fallback"),
    DeviceType=types.SimpleNamespace(GPU="GPU", DLA="DLA"),
)


def placed(can: set[str], cores: int = 2) -> tuple[int, Config]:
    names = [node.name for node in graph().graph.node]
    layers = [types.SimpleNamespace(name=name) for name in names]
    network = types.SimpleNamespace(num_layers=len(layers), get_layer=layers.__getitem__)
    config = Config(can)
    builder = types.SimpleNamespace(num_DLA_cores=cores)
    return dla.place(TRT, builder, network, config, FRONT), config


def test_what_can_run_there_does_and_the_transformer_does_not() -> None:
    can = {"backbone conv", "backbone relu", "neck conv", "encoder relu"}
    count, config = placed(can)
    assert count == 3
    assert config.devices == dict.fromkeys(["backbone conv", "backbone relu", "neck conv"], "DLA")
    assert config.flags == ["fallback"] and config.DLA_core == 0


@pytest.mark.parametrize(
    ("can", "cores", "words"),
    [({"backbone conv"}, 0, "no deep learning accelerator"), (set(), 2, "can run no layer")],
)
def test_where_there_is_none(can: set[str], cores: int, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        placed(can, cores)
    assert error.value.code == "engine-option"
