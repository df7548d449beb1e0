"""Both bodies of the attention function against an independent double-precision reference."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from detr.points import Points, level_points, sample_axes, unequal
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
CASES = [(shapes, HEAD) for shapes in LAYOUTS]
CASES += [(LAYOUTS[1], HeadShape(3, 5, (3, 1))), (LAYOUTS[2], HeadShape(3, 5, (1, 4, 2, 3)))]
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
    head: HeadShape = HEAD,
) -> onnx.ModelProto:
    tokens, samples = sum(h * w for h, w in shapes), sample_axes(head.points, len(shapes))

    def info(name: str, *shape: int | str) -> onnx.ValueInfoProto:
        halved = half and name in ("value", "output")
        kind = TensorProto.FLOAT16 if halved else TensorProto.FLOAT
        return helper.make_tensor_value_info(name, kind, shape)

    graph = helper.make_graph(
        [make_node("value", "locations", "weights", "output", shapes, "", unequal(head.points))],
        "one_attention",
        [
            info("value", "B", tokens, head.heads, head.channels),
            info("locations", "B", "Q", head.heads, *samples, 2),
            info("weights", "B", "Q", head.heads, *samples),
        ],
        [info("output", "B", "Q", head.heads * head.channels)],
    )
    result = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    set_lowering(result, head, lowering, gather_sum)
    onnx.checker.check_model(result, full_check=True)
    return result


def reference(feed: dict[str, Any], shapes: Any, points: Points = HEAD.points) -> Any:
    """One sample at a time, in double precision, by the definition of bilinear interpolation."""
    value, counts = feed["value"].astype(np.float64), level_points(points, len(shapes))
    batch, _, heads, channels = value.shape
    queries = feed["locations"].shape[1]
    locations = feed["locations"].reshape(batch, queries, heads, sum(counts), 2)
    weights = feed["weights"].reshape(batch, queries, heads, sum(counts))
    levels = np.repeat(np.arange(len(shapes)), counts)
    out = np.zeros((batch, queries, heads, channels))
    starts = np.cumsum([0, *(h * w for h, w in shapes)])
    for b, q, m, k in itertools.product(*map(range, (batch, queries, heads, sum(counts)))):
        height, width = shapes[levels[k]]
        x = float(locations[b, q, m, k, 0]) * width - 0.5
        y = float(locations[b, q, m, k, 1]) * height - 0.5
        for row in range(height):
            for column in range(width):
                share = max(0.0, 1 - abs(x - column)) * max(0.0, 1 - abs(y - row))
                token = starts[levels[k]] + row * width + column
                out[b, q, m] += float(weights[b, q, m, k]) * share * value[b, token, m]
    return out.reshape(batch, queries, heads * channels)


def inputs(shapes: Any, batch: int, head: HeadShape = HEAD) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    tokens, queries = sum(h * w for h, w in shapes), 9
    sampling = (batch, queries, head.heads, *sample_axes(head.points, len(shapes)))
    locations = generator.uniform(-0.3, 1.3, (*sampling, 2))
    # Corners and edges of the map, cell centers, and far outside on all sides.
    for query, where in enumerate([(0, 0), (1, 1), (0, 1), (0.5, 0.5), (-1e6, 1e6), (1e6, 0.5)]):
        locations[:, query] = where
    arrays = {
        "value": generator.normal(size=(batch, tokens, head.heads, head.channels)),
        "locations": locations,
        "weights": generator.uniform(size=sampling),
    }
    return {name: array.astype(np.float32) for name, array in arrays.items()}


@pytest.mark.parametrize("opset", [17, 18])
@pytest.mark.parametrize(("lowering", "gather_sum"), BODIES)
@pytest.mark.parametrize(("shapes", "head"), CASES, ids=str)
def test_body_is_bilinear_with_zero_padding(
    shapes: Any, head: HeadShape, lowering: Lowering, gather_sum: GatherSum, opset: int
) -> None:
    made = model(shapes, lowering, opset, gather_sum=gather_sum, head=head)
    session = ort.InferenceSession(made.SerializeToString())
    for batch in (1, 3):
        feed = inputs(shapes, batch, head)
        (out,) = session.run(None, feed)
        expected = reference(feed, shapes, head.points)
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
    expected = reference(feed, shapes)
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


def test_unequal_points_are_on_the_node_and_ask_for_their_own_plugin() -> None:
    node = make_node("v", "l", "w", "o", LAYOUTS[1], points=(3, 1))
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    assert attributes == {
        "spatial_shapes": [5, 7, 3, 4],
        "points": [3, 1],
        "plugin_namespace": b"detr_unequal",
        "plugin_version": b"1",
    }


def test_nodes_of_other_points_than_the_body_are_refused() -> None:
    made = model(LAYOUTS[1], "gather", 17, head=HeadShape(3, 5, (3, 1)))
    with pytest.raises(ValueError, match="nodes of other points than 2"):
        set_lowering(made, HEAD, "gather")


def test_opset_20_is_refused() -> None:
    with pytest.raises(ValueError, match="opset 20"):
        make_function(LAYOUTS[0], HEAD, "gridsample", 20)


def test_indices_beyond_float32_are_refused() -> None:
    with pytest.raises(ValueError, match="exact float32"):
        make_function([(4096, 4096)], HEAD, "gather", 17)
