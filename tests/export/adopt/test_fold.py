"""Deformable attention is found however it is spelt, and nothing else is taken for it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import ModelProto, inliner

from engines.msda_function import (
    HeadShape,
    is_attention,
    make_function,
    make_node,
    node_points,
    set_lowering,
)
from export.adopt.fold import fold_attention

sys.path.insert(0, str(Path(__file__).parent))
from adopt_graphs import CHANNELS, HEADS, POINTS, SHAPES, Nodes, attention, spatial_transformer


def run(model: ModelProto) -> list[Any]:
    rng = np.random.default_rng(0)
    feed = {}
    for value in model.graph.input:
        shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
        # Locations reach beyond the map.
        feed[value.name] = (rng.random(shape) * 1.6 - 0.3).astype(np.float32)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return list(ort.InferenceSession(model.SerializeToString(), options).run(None, feed))


SPELLINGS: dict[str, dict[str, Any]] = {
    "split": {},
    "slice": {"split": False},
    "concatenated": {"stacked": False},
    "added": {"subtract": False},
    "heads-apart": {"keep_heads_apart": True},
    "channels-first": {"channels_last": False},
    "other-order": {"order": (1, 0)},
    "own-maps": {"own_maps": True},
    "slice-concatenated-first": {"split": False, "stacked": False, "channels_last": False},
    "unequal": {"pieces": (4, 2), "stacked": False},
    "unequal-other-maps": {"pieces": (1, 3), "stacked": False, "own_maps": True, "split": False},
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_an_attention_becomes_one_node(spelling: dict[str, Any]) -> None:
    model = attention(**spelling)
    if spelling.get("order") == (1, 0):
        # Maps and locations are by level, weights are joined in the order of the samples: what is
        # joined another way round is another attention, of values in another order.
        folded = fold_attention(model)
        assert folded.folds == () and "order" in folded.left[0]
        return
    before = model.SerializeToString()
    folded = fold_attention(model)
    assert model.SerializeToString() == before
    points = spelling.get("pieces", POINTS)
    assert [fold.head for fold in folded.folds] == [HeadShape(HEADS, CHANNELS, points)]
    assert folded.folds[0].shapes == SHAPES and folded.left == ()
    nodes = folded.model.graph.node
    assert [node_points(n) for n in nodes if is_attention(n)] == [spelling.get("pieces")]
    assert not any(node.op_type == "GridSample" for node in nodes)
    for lowering in ("gridsample", "gather"):
        set_lowering(folded.model, folded.folds[0].head, lowering)  # type: ignore[arg-type]
        onnx.checker.check_model(folded.model)
        for expected, found in zip(run(model), run(folded.model), strict=True):
            np.testing.assert_allclose(found, expected, atol=2e-6)


def test_our_own_body_is_read_back() -> None:
    head = HeadShape(HEADS, CHANNELS, POINTS)
    node = make_node("value", "locations", "weights", "output", SHAPES)
    function = make_function(SHAPES, head, "gridsample", 17)
    tokens = sum(h * w for h, w in SHAPES)
    sizes = {
        "value": [1, tokens, HEADS, CHANNELS],
        "locations": [1, 5, HEADS, len(SHAPES), POINTS, 2],
        "weights": [1, 5, HEADS, len(SHAPES), POINTS],
    }
    make = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [make(name, onnx.TensorProto.FLOAT, size) for name, size in sizes.items()],
        [make("output", onnx.TensorProto.FLOAT, [1, 5, HEADS * CHANNELS])],
    )
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("detr", 1)]
    model = onnx.helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=9)
    inlined = inliner.inline_local_functions(model)
    folded = fold_attention(inlined)
    assert len(folded.folds) == 1 and folded.left == ()
    set_lowering(folded.model, folded.folds[0].head, "gather")
    np.testing.assert_allclose(run(folded.model)[0], run(inlined)[0], atol=2e-6)


def _shifted(n: Nodes, grid: str) -> str:
    return str(n.op("Add", grid, n.const(0.1, np.float32)))


def _by_channel(n: Nodes, share: str) -> str:
    factors = np.linspace(0.5, 1.5, CHANNELS, dtype=np.float32).reshape(1, CHANNELS, 1, 1)
    return str(n.op("Mul", share, n.const(factors, np.float32)))


NEARLY: dict[str, tuple[dict[str, Any], str]] = {
    "nearest": ({"sample": {"mode": "nearest"}}, "nearest"),
    "border": ({"sample": {"padding_mode": "border"}}, "padding"),
    "aligned": ({"sample": {"align_corners": 1}}, "aligned corners"),
    "shifted": ({"grid": _shifted}, "2 x - 1"),
    "by-channel": ({"weighting": _by_channel}, "channels"),
    "unequal-other-order": ({"pieces": (4, 2), "stacked": False, "order": (1, 0)}, "order"),
}


@pytest.mark.parametrize(("change", "reason"), NEARLY.values(), ids=NEARLY)
def test_what_is_nearly_one_stays_and_is_told(change: dict[str, Any], reason: str) -> None:
    model = attention(**change)
    folded = fold_attention(model)
    assert folded.folds == () and any(reason in left for left in folded.left)
    assert [n.SerializeToString() for n in folded.model.graph.node] == [
        n.SerializeToString() for n in model.graph.node
    ]


@pytest.mark.parametrize("seed", range(20))
def test_other_uses_of_grid_sample_stay(seed: int) -> None:
    model = spatial_transformer(seed)
    folded = fold_attention(model)
    assert folded.folds == ()
    assert len(folded.model.graph.node) == len(model.graph.node)
    for expected, found in zip(run(model), run(folded.model), strict=True):
        np.testing.assert_array_equal(found, expected)
