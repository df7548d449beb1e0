"""INT8: pairs where they pay, scales from real images, and an honest verdict."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from detr.data.preprocess import preprocess
from detr.types import FloatArray
from engines.half_emulation import half_session
from engines.parity import Budget
from engines.precision_report import PrecisionComparison, PrecisionRow
from engines.torch_engine import TorchEngine
from export.golden import drawn_images
from export.parity.compare import compare_detections
from export.precision import int8 as int8_module
from export.precision.cost import advice
from export.precision.half import finish_half, to_half
from export.precision.int8 import (
    _best_scale,
    _groups,
    _histogram,
    calibrate,
    quantize,
    quantized_nodes,
)
from export.precision.node_kinds import Network
from export.precision.ranges import value_ranges
from export.precision.trial import session_detections
from export.trace.torch_to_onnx import export_graph

MakeCheckpoint = Callable[..., Path]
WORTH = 0.01


@pytest.fixture(scope="module")
def engine(checkpoint: MakeCheckpoint) -> TorchEngine:
    return TorchEngine(checkpoint("dino"))


@pytest.fixture(scope="module")
def int8(engine: TorchEngine) -> ModelProto:
    config = engine.info.preprocess
    model = export_graph(engine.detector, config.size, 17, "dynamic", "gather")
    images = drawn_images(config.size)
    ranges = value_ranges(model, images, config, 1)
    scales = calibrate(model, images, config, 1, ranges)
    touched = quantize(model, scales)
    typed = to_half(model, ranges=ranges, single=touched).model
    finish_half(typed, engine.info.detector, "gather")
    return typed


@pytest.mark.slow
def test_pairs_sit_on_weighted_products_alone(int8: ModelProto) -> None:
    graph = int8.graph
    back = {n.output[0]: n for n in graph.node if n.op_type == "DequantizeLinear"}
    readers = [n for n in graph.node if any(x in back for x in n.input)]
    assert {n.op_type for n in readers} == {"Conv", "MatMul"}
    assert all(n.input[0] in back and n.input[1] in back for n in readers), "half a pair"
    names = " ".join(n.name for n in readers)
    assert "value_proj" in names and "ffn.expand" in names and "backbone" in names
    for kept in ("sampling_offsets", "attention_weights", "heads", "head/", "reference_mlp"):
        assert kept not in names
    first = next(n for n in graph.node if n.op_type == "Conv")
    assert first.input[0] not in back


def test_quantization_is_what_tensorrt_reads(int8: ModelProto) -> None:
    weights = {x.name: numpy_helper.to_array(x) for x in int8.graph.initializer}
    per_channel = 0
    for node in int8.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        scale, zero = (weights[x] for x in node.input[1:3])
        assert zero.dtype == np.int8 and not zero.any()
        assert scale.dtype == np.float32 and (scale > 0).all()
        if node.input[0] in weights:
            assert weights[node.input[0]].dtype == np.int8
            axis = next(a.i for a in node.attribute if a.name == "axis")
            assert weights[node.input[0]].shape[axis] == scale.size > 1
            per_channel += 1
        else:
            assert scale.shape == ()
    assert per_channel > 20


def test_int8_still_finds_the_objects(int8: ModelProto, engine: TorchEngine) -> None:
    images = drawn_images(engine.info.preprocess.canvases[0])
    expected = engine(images)
    feed = preprocess(images, engine.info.preprocess)
    found = session_detections(half_session(int8), feed)
    wide = Budget(score=0.5, score_median=0.05, box_px=60, box_px_median=3, missing=0.3, extra=0.3)
    parity = compare_detections(expected, found, wide)
    assert parity.violations(wide) == []
    assert parity.max_score > 0, "nothing was quantized"


def test_magnitudes_are_counted_as_numpy_counts_them() -> None:
    values = np.random.default_rng(0).integers(-500, 501, (3, 41, 1000)).astype(np.float32)
    top = float(np.abs(values).max())
    expected, _ = np.histogram(np.abs(values), 2048, (0.0, top))
    np.testing.assert_array_equal(_histogram(values, top), expected)
    assert _histogram(np.zeros((2, 3), np.float32), 0.0)[0] == 6


@pytest.mark.slow
def test_activations_are_held_in_groups(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = Network(
        export_graph(engine.detector, engine.info.preprocess.canvases[0], 17, 2, "gather")
    )
    names = sorted({network.nodes[i].input[0] for i in quantized_nodes(network)})
    assert _groups(network, names, 2) == [names], "a toy's fit into one run"
    monkeypatch.setattr(int8_module, "_AT_ONCE", 1 << 16)
    groups = _groups(network, names, 2)
    assert [name for group in groups for name in group] == names and len(groups) > 1


def test_scale_gives_up_a_lone_outlier_but_not_a_flat_tail() -> None:
    body = np.zeros(2048)
    body[:200] = 1e5
    body[-1] = 1
    assert _best_scale(body, 10.0) * 127 < 3.0
    assert _best_scale(np.full(2048, 10.0), 10.0) * 127 > 9.0
    assert _best_scale(np.zeros(2048), 0.0) > 0


def quantized_by_hand(x: FloatArray, scale: float) -> FloatArray:
    return np.clip(np.round(x / scale), -128, 127).astype(np.float32) * np.float32(scale)


def test_a_product_is_computed_in_int8() -> None:
    generator = np.random.default_rng(0)
    w, x = (generator.normal(size=s).astype(np.float32) for s in ((8, 4), (2, 8)))

    def value(name: str, *shape: int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    nodes = [
        helper.make_node("Relu", ["images"], ["h"], "block/Relu_0"),
        helper.make_node("MatMul", ["h", "w"], ["boxes"], "block/MatMul_0"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [value("images", 2, 8)],
        [value("boxes", 2, 4)],
        [numpy_helper.from_array(w, "w")],
        value_info=[value("h", 2, 8)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    touched = quantize(model, {"h": 0.02})
    typed = to_half(model, (), single=touched).model
    onnx.checker.check_model(typed, full_check=True)
    (found,) = half_session(typed).run(None, {"images": x})
    steps = np.abs(w).max(axis=0) / 127
    half = np.maximum(x, 0).astype(np.float16).astype(np.float32)
    expected = quantized_by_hand(half, 0.02) @ (np.round(w / steps) * steps)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_attention_over_constant_values_stays_out() -> None:
    """Content queries meet the first layer alike on every image: their values are constants."""

    def value(name: str, *shape: int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    nodes = [
        helper.make_node("Relu", ["images"], ["scores"], "block/Relu_0"),
        helper.make_node("MatMul", ["scores", "values"], ["boxes"], "block/MatMul_0"),
    ]
    values = np.random.default_rng(0).normal(size=(1, 2, 8, 4)).astype(np.float32)
    graph = helper.make_graph(
        nodes,
        "g",
        [value("images", 1, 2, 8, 8)],
        [value("boxes", 1, 2, 8, 4)],
        [numpy_helper.from_array(values, "values")],
        value_info=[value("scores", 1, 2, 8, 8)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    assert quantize(model, {"scores": 0.02}) == set()
    assert [node.op_type for node in model.graph.node] == ["Relu", "MatMul"]


def rows(**last: Any) -> list[PrecisionRow]:
    return [
        PrecisionRow(name="fp32", ap=0.5, cpu_ms=10.0, size_mb=40.0),
        PrecisionRow(name="fp16", ap=0.5, cpu_ms=9.0, size_mb=20.0),
        PrecisionRow(**({"name": "int8", "ap": 0.499, "cpu_ms": 5.0, "size_mb": 11.0} | last)),
    ]


PAYS = "int8 pays on this CPU in native: 5.0 ms where fp16 takes 9.0"


@pytest.mark.parametrize(
    ("last", "says"),
    [
        ({}, [PAYS]),
        ({"ap": 0.48}, ["do not use int8: it loses 0.0200 AP against fp32", PAYS]),
        ({"cpu_ms": 9.0}, ["do not use int8 on this CPU in native: 9.0 ms where fp16 takes 9.0"]),
        ({"size_mb": 20.0}, ["int8 is no smaller than fp16", PAYS]),
    ],
)
def test_verdict_follows_from_the_figures(last: dict[str, float], says: list[str]) -> None:
    *lines, caution = advice(rows(**last), WORTH, "native")
    assert len(lines) == len(says)
    assert all(line.startswith(start) for line, start in zip(lines, says, strict=True))
    assert "nothing about a GPU" in caution


def test_table_shows_each_precision() -> None:
    verdict = PrecisionComparison(
        images=9, batch=1, engine="native", rows=tuple(rows()), advice=("use it",)
    )
    lines = verdict.table().splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["fp32", "fp16", "int8"]
    assert "-0.0010" in lines[3] and lines[-1] == "use it"
