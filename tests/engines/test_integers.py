"""8-bit products are right on every processor, also where their sums saturate in 16 bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines import open_engine, openvino_engine
from engines.bundle import MODEL
from engines.openvino_integers import IN_FLOAT, count_from_128, quantized, sums_saturate
from engines.ort_engine import open_session

SIDE, SCALE = 64, 0.01
# At the end of its range every product is as large as can be, and all have one sign.
LARGEST = 127 * SCALE


def product(kind: str) -> onnx.ModelProto:
    """A quantized matrix product, or a convolution of 1 or 3 cells, by 127s alone."""
    cells = 3 if kind == "Conv of 3" else 1
    convolves = kind != "MatMul"
    weight = (SIDE, SIDE, cells, cells) if convolves else (SIDE, SIDE)
    shape = [1, SIDE, 8, 8] if convolves else [1, 8, SIDE]
    constants = {
        "s": np.float32(SCALE),
        "z": np.int8(0),
        "w8": np.full(weight, 127, np.int8),
        "ws": np.full(SIDE, SCALE, np.float32),
        "wz": np.zeros(SIDE, np.int8),
    }
    options = {"pads": [cells // 2] * 4} if convolves else {}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w8", "ws", "wz"], ["w"], axis=int(not convolves)),
        helper.make_node("Conv" if convolves else "MatMul", ["d", "w"], ["y"], **options),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xy"]
    weights = [numpy_helper.from_array(np.asarray(x), name) for name, x in constants.items()]
    graph = helper.make_graph(nodes, "product", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def inputs(kind: str) -> np.ndarray:
    return np.full([1, 8, SIDE] if kind == "MatMul" else [1, SIDE, 8, 8], LARGEST, np.float32)


def center(kind: str, found: np.ndarray) -> float:
    """One value of the result that no border touches, in products."""
    inner = found[0, 4, 4] if kind == "MatMul" else found[0, 0, 4, 4]
    return float(inner) / LARGEST**2


KINDS = {"MatMul": SIDE, "Conv of 1": SIDE, "Conv of 3": 9 * SIDE}


@pytest.mark.parametrize("kind", KINDS)
def test_onnxruntime_sums_do_not_saturate(kind: str) -> None:
    session = open_session(product(kind))
    assert center(kind, session.run(None, {"x": inputs(kind)})[0]) == pytest.approx(
        KINDS[kind], rel=1e-4
    )


@pytest.mark.parametrize("kind", KINDS)
def test_openvino_computes_in_float_where_they_do(kind: str) -> None:
    core = openvino_engine._openvino().Core()
    model = core.read_model(product(kind).SerializeToString())
    settings = IN_FLOAT if sums_saturate() else {}
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", **settings})
    assert center(kind, compiled(inputs(kind))[0]) == pytest.approx(KINDS[kind], rel=1e-4)


def fusion() -> onnx.ModelProto:
    """Two maps side by side, quantized, through a convolution of one cell."""
    generator = np.random.default_rng(0)
    constants = {
        "s": np.float32(0.03),
        "z": np.int8(0),
        "w8": generator.integers(-127, 128, (SIDE, 2 * SIDE, 1, 1)).astype(np.int8),
        "ws": np.full(SIDE, SCALE, np.float32),
        "wz": np.zeros(SIDE, np.int8),
    }
    nodes = [
        helper.make_node("Concat", ["a", "b"], ["x"], axis=1),
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w8", "ws", "wz"], ["w"], axis=0),
        helper.make_node("Conv", ["d", "w"], ["y"]),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, SIDE, 8, 8]) for name in "aby"
    ]
    between = [helper.make_tensor_value_info("q", TensorProto.INT8, [1, 2 * SIDE, 8, 8])]
    weights = [numpy_helper.from_array(np.asarray(x), name) for name, x in constants.items()]
    graph = helper.make_graph(nodes, "fusion", ends[:2], ends[2:], weights, value_info=between)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_maps_that_are_fused_keep_their_scale() -> None:
    """Signed, OpenVINO 2026.4 rounds them to whole numbers where it computes in integers."""
    generator = np.random.default_rng(1)
    # Past both ends of the range as well, which saturate alike.
    maps = {name: 2 * generator.standard_normal((1, SIDE, 8, 8), np.float32) for name in "ab"}
    wanted = open_session(fusion()).run(None, maps)[0]
    model = fusion()
    count_from_128(model)
    onnx.checker.check_model(model, full_check=True)
    np.testing.assert_allclose(open_session(model).run(None, maps)[0], wanted, rtol=0, atol=2e-4)
    core = openvino_engine._openvino().Core()
    settings = IN_FLOAT if sums_saturate() else {}
    compiled = core.compile_model(
        core.read_model(model.SerializeToString()),
        "CPU",
        {"INFERENCE_PRECISION_HINT": "f32", **settings},
    )
    np.testing.assert_allclose(compiled(maps)[0], wanted, rtol=0, atol=2e-3 * np.abs(wanted).max())


@pytest.mark.parametrize("saturate", [True, False])
@pytest.mark.parametrize("integers", [True, False])
def test_the_engine_says_how_it_computes_integers(
    toy_bundle: Callable[..., Path],
    saturate: bool,
    integers: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(openvino_engine, "sums_saturate", lambda: saturate)
    folder = toy_bundle()
    if integers:
        model = onnx.load(str(folder / MODEL))
        add_pair(model)
        assert quantized(model)
        monkeypatch.setattr(onnx, "load", lambda *_, **__: model)
    engine = open_engine(folder, "openvino")
    assert isinstance(engine, openvino_engine.OpenVinoEngine)
    told = ("in float32" if saturate else "counted from 128") if integers else "none"
    assert engine.versions.get("integers", "none").startswith(told)
    assert (IN_FLOAT.items() <= engine._settings.items()) == (saturate and integers)
    if integers:  # as it was read
        kinds = {x.data_type for x in model.graph.initializer if x.name.startswith("pair/zero/")}
        assert kinds == (set() if saturate else {TensorProto.UINT8})


def add_pair(model: onnx.ModelProto) -> None:
    """Quantizes the images and takes them back, which changes them little."""
    graph = model.graph
    graph.initializer.append(numpy_helper.from_array(np.float32(0.05), "pair/scale"))
    graph.initializer.append(numpy_helper.from_array(np.int8(0), "pair/zero"))
    for node in graph.node:
        for slot, name in enumerate(node.input):
            if name == "images":
                node.input[slot] = "pair/back"
    pair = ["pair/scale", "pair/zero"]
    graph.node.insert(0, helper.make_node("QuantizeLinear", ["images", *pair], ["pair/q"], "q"))
    graph.node.insert(
        1, helper.make_node("DequantizeLinear", ["pair/q", *pair], ["pair/back"], "d")
    )
