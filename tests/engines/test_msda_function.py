"""Both bodies of the attention function against an independent double-precision reference."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from engines.msda_function import (
    GatherSum,
    HeadShape,
    Lowering,
    make_function,
    make_node,
    set_lowering,
)

HEAD = HeadShape(heads=3, channels=5, points=2)
LAYOUTS = [((1, 1),), ((5, 7), (3, 4)), ((4, 9), (1, 1), (2, 3), (1, 2))]
BODIES: list[tuple[Lowering, GatherSum]] = [
    ("gridsample", "matmul"),
    ("gather", "matmul"),
    ("gather", "reduce"),
]


def model(
    shapes: Any,
    lowering: Lowering,
    opset: int,
    half: bool = False,
    gather_sum: GatherSum = "matmul",
) -> onnx.ModelProto:
    tokens, levels = sum(h * w for h, w in shapes), len(shapes)

    def info(name: str, *shape: int | str) -> onnx.ValueInfoProto:
        halved = half and name in ("value", "output")
        kind = TensorProto.FLOAT16 if halved else TensorProto.FLOAT
        return helper.make_tensor_value_info(name, kind, shape)

    graph = helper.make_graph(
        [make_node("value", "locations", "weights", "output", shapes)],
        "one_attention",
        [
            info("value", "B", tokens, HEAD.heads, HEAD.channels),
            info("locations", "B", "Q", HEAD.heads, levels, HEAD.points, 2),
            info("weights", "B", "Q", HEAD.heads, levels, HEAD.points),
        ],
        [info("output", "B", "Q", HEAD.heads * HEAD.channels)],
    )
    result = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    set_lowering(result, HEAD, lowering, gather_sum)
    onnx.checker.check_model(result, full_check=True)
    return result


def reference(value: Any, shapes: Any, locations: Any, weights: Any) -> Any:
    """One sample at a time, in double precision, by the definition of bilinear interpolation."""
    batch, _, heads, channels = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    out = np.zeros((batch, queries, heads, channels))
    starts = np.cumsum([0, *(h * w for h, w in shapes)])
    for b, q, m, p in itertools.product(*map(range, (batch, queries, heads, points))):
        for v, (height, width) in enumerate(shapes):
            x = float(locations[b, q, m, v, p, 0]) * width - 0.5
            y = float(locations[b, q, m, v, p, 1]) * height - 0.5
            for row in range(height):
                for column in range(width):
                    share = max(0.0, 1 - abs(x - column)) * max(0.0, 1 - abs(y - row))
                    token = starts[v] + row * width + column
                    out[b, q, m] += float(weights[b, q, m, v, p]) * share * value[b, token, m]
    return out.reshape(batch, queries, heads * channels)


def inputs(shapes: Any, batch: int, seed: int = 0) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    tokens, levels, queries = sum(h * w for h, w in shapes), len(shapes), 9
    sampling = (batch, queries, HEAD.heads, levels, HEAD.points)
    locations = generator.uniform(-0.3, 1.3, (*sampling, 2))
    # Corners and edges of the map, cell centers, and far outside on all sides.
    for query, where in enumerate([(0, 0), (1, 1), (0, 1), (0.5, 0.5), (-1e6, 1e6), (1e6, 0.5)]):
        locations[:, query] = where
    arrays = {
        "value": generator.normal(size=(batch, tokens, HEAD.heads, HEAD.channels)),
        "locations": locations,
        "weights": generator.uniform(size=sampling),
    }
    return {name: array.astype(np.float32) for name, array in arrays.items()}


@pytest.mark.parametrize("opset", [17, 18])
@pytest.mark.parametrize(("lowering", "gather_sum"), BODIES)
@pytest.mark.parametrize("shapes", LAYOUTS, ids=str)
def test_body_is_bilinear_with_zero_padding(
    shapes: Any, lowering: Lowering, gather_sum: GatherSum, opset: int
) -> None:
    made = model(shapes, lowering, opset, gather_sum=gather_sum)
    session = ort.InferenceSession(made.SerializeToString())
    for batch in (1, 3):
        feed = inputs(shapes, batch)
        (out,) = session.run(None, feed)
        expected = reference(feed["value"], shapes, feed["locations"], feed["weights"])
        assert out.shape == expected.shape
        np.testing.assert_allclose(out, expected, atol=2e-6)


@pytest.mark.parametrize("opset", [17, 18])
@pytest.mark.parametrize(("lowering", "gather_sum"), BODIES)
def test_half_values_are_weighted_and_summed_in_single(
    lowering: Lowering, gather_sum: GatherSum, opset: int
) -> None:
    shapes = LAYOUTS[2]
    made = model(shapes, lowering, opset, True, gather_sum)
    session = ort.InferenceSession(made.SerializeToString())
    feed = inputs(shapes, 2)
    feed["value"] = feed["value"].astype(np.float16)
    (out,) = session.run(None, feed)
    value = feed["value"].astype(np.float64)
    expected = reference(value, shapes, feed["locations"], feed["weights"])
    assert out.dtype == np.float16
    # One rounding, that of the result: half an ulp.
    np.testing.assert_allclose(out, expected, rtol=2**-11, atol=2e-6)


@pytest.mark.parametrize("lowering", ["gridsample", "gather"])
def test_body_needs_no_shape_arithmetic_and_no_control_flow(lowering: Lowering) -> None:
    function = make_function(LAYOUTS[1], HEAD, lowering, 17)
    used = {node.op_type for node in function.node}
    assert not used & {"Shape", "Loop", "If", "Mod", "ScatterND", "Range", "NonZero"}
    assert ("GridSample" in used) == (lowering == "gridsample")
    # What runs operator after operator keeps the product that reads each sample once.
    assert ("MatMul" in used) == (lowering == "gather")


def test_the_plugin_is_named_on_the_node() -> None:
    node = make_node("v", "l", "w", "o", LAYOUTS[1])
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    assert attributes == {
        "spatial_shapes": [5, 7, 3, 4],
        "plugin_namespace": b"detr",
        "plugin_version": b"1",
    }


def test_opset_20_is_refused() -> None:
    with pytest.raises(ValueError, match="opset 20"):
        make_function(LAYOUTS[0], HEAD, "gridsample", 20)


def test_indices_beyond_float32_are_refused() -> None:
    with pytest.raises(ValueError, match="exact float32"):
        make_function([(4096, 4096)], HEAD, "gather", 17)
