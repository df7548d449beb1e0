"""Convolutions of a graph in our kernel: which are exchanged, and that nothing else changes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from detr import winograd
from engines.openvino_convolution import OP_TYPE, conversion, exchange

openvino = pytest.importorskip("openvino")
pytestmark = pytest.mark.skipif(not winograd.available(), reason="no kernel, or no AVX2")

Node = tuple[str, list[str], str, dict[str, Any]]
SAME: dict[str, Any] = {"pads": [1, 1, 1, 1]}


def graph(nodes: list[Node], results: list[str]) -> onnx.ModelProto:
    """A model of nodes over the map x with 16 channels and the weights w, of 16 to 16."""
    generator = np.random.default_rng(1)
    constants = {
        "w": generator.standard_normal((16, 16, 3, 3)) / 12,
        "half": generator.standard_normal((16, 16, 3, 3)) / 12,
        "point": generator.standard_normal((16, 16, 1, 1)) / 4,
        "b": generator.standard_normal(16),
        "one": np.ones((1, 16, 1, 1)),
    }
    return helper.make_model(
        helper.make_graph(
            [
                helper.make_node(kind, inputs, [out], out, **said)
                for kind, inputs, out, said in nodes
            ],
            "x",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 16, 7, 10])],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in results],
            [numpy_helper.from_array(x.astype(np.float32), name) for name, x in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=9,
    )


def block(last: str) -> list[Node]:
    """Two convolutions with a shortcut."""
    return [
        ("Conv", ["x", "w", "b"], "a", SAME),
        ("Relu", ["a"], "r", {}),
        ("Conv", ["r", "w"], "c", SAME),
        ("Add", ["c", "x"] if last == "x" else [last, "c"], "s", {}),
        ("Relu", ["s"], "y", {}),
    ]


SILU: list[Node] = [
    ("Conv", ["x", "w"], "a", SAME),
    ("Sigmoid", ["a"], "g", {}),
    ("Mul", ["a", "g"], "m", {}),
    ("Conv", ["m", "w"], "y", SAME),
]


@pytest.mark.parametrize(
    ("nodes", "results", "ours", "others"),
    [
        # The shortcut of an input has no known shape; the one of a map has.
        (block("x"), ["y"], 2, {"Add": 1, "Relu": 1}),
        (block("r"), ["y"], 2, {}),
        (block("r"), ["y", "c"], 2, {"Add": 1, "Relu": 1}),
        (block("one"), ["y"], 2, {"Add": 1, "Relu": 1}),
        (SILU, ["y"], 2, {}),
        ([*SILU, ("Neg", ["g"], "n", {})], ["y", "n"], 2, {"Sigmoid": 1, "Mul": 1, "Neg": 1}),
        # Both ends of one addition are ours: it goes with the first.
        (
            [
                ("Conv", ["x", "w"], "a", SAME),
                ("Conv", ["x", "half"], "c", SAME),
                ("Add", ["a", "c"], "s", {}),
                ("Relu", ["s"], "y", {}),
            ],
            ["y"],
            2,
            {},
        ),
        ([("Conv", ["x", "w"], "y", {**SAME, "strides": [2, 2]})], ["y"], 0, {"Conv": 1}),
        ([("Conv", ["x", "w"], "y", {})], ["y"], 0, {"Conv": 1}),
        ([("Conv", ["x", "point"], "y", {})], ["y"], 0, {"Conv": 1}),
    ],
)
def test_the_graph_computes_what_it_did(
    nodes: list[Node], results: list[str], ours: int, others: dict[str, int]
) -> None:
    model = graph(nodes, results)
    x = np.random.default_rng(2).standard_normal((2, 16, 7, 10)).astype(np.float32)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    wanted = session.run(results, {"x": x})

    kernels = exchange(model)
    kinds = Counter(node.op_type for node in model.graph.node)
    assert len(kernels) == kinds.pop(OP_TYPE, 0) == ours
    kinds.pop("Transpose", None)
    assert kinds == others

    operators: list[Any] = []
    core = openvino.Core()
    core.add_extension(conversion(kernels, operators, 1))
    read = core.read_model(model.SerializeToString())
    read.reshape({"x": [2, 16, 7, 10]})
    found = core.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x)
    for name, value in zip(results, wanted, strict=True):
        np.testing.assert_allclose(found[name], value, atol=2e-5, rtol=1e-5)
