"""Lowering to opset 17 keeps the meaning, and refuses what it cannot say."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.trace.opset17 import lower_to_17


def model(*nodes: onnx.NodeProto, opset: int = 18) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 6, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.array([1, 2], np.int64), "axes")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


@pytest.mark.parametrize(
    "nodes",
    [
        [helper.make_node("ReduceMax", ["x", "axes"], ["y"], keepdims=0)],
        [helper.make_node("ReduceMean", ["x"], ["y"], keepdims=1)],
        [helper.make_node("ReduceSum", ["x", "axes"], ["y"])],
        [
            helper.make_node("Split", ["x"], ["a", "b", "c"], axis=1, num_outputs=3),
            helper.make_node("Concat", ["c", "a", "b"], ["y"], axis=1),
        ],
    ],
    ids=lambda nodes: nodes[0].op_type,
)
def test_same_result_in_opset_17(nodes: list[onnx.NodeProto]) -> None:
    x = np.random.default_rng(0).normal(size=(2, 6, 4)).astype(np.float32)
    before = model(*nodes)
    after = onnx.ModelProto()
    after.CopyFrom(before)
    lower_to_17(after)
    assert after.opset_import[0].version == 17
    results = [
        ort.InferenceSession(m.SerializeToString()).run(None, {"x": x})[0] for m in (before, after)
    ]
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize(
    "node",
    [
        helper.make_node("ReduceMax", ["x", "computed"], ["y"]),
        helper.make_node("ReduceMax", ["x"], ["y"], noop_with_empty_axes=1),
        helper.make_node("Split", ["x"], ["y", "z"], axis=2, num_outputs=3),
        helper.make_node("Mish", ["x"], ["y"]),
        helper.make_node("Resize", ["x", "", "axes"], ["y"], antialias=1),
    ],
    ids=lambda node: node.op_type,
)
def test_what_opset_17_cannot_say_is_refused(node: onnx.NodeProto) -> None:
    with pytest.raises(ValueError, match=node.op_type):
        lower_to_17(model(node))


def test_only_18_is_lowered() -> None:
    with pytest.raises(ValueError, match="opset 20"):
        lower_to_17(model(opset=20))
