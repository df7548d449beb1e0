"""A small bundle written by hand, so that the engines are tested without torch or an export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from detr.config import ClassMap, DetectorConfig
from detr.data.preprocess import PreprocessConfig
from detr.files import sha256
from detr.mask_scaling import MaskScaling
from detr.model_info import ModelInfo
from detr.points import Points, sample_axes, unequal
from detr.types import Detections
from engines.bundle import GOLDEN, MODEL, SIDECAR, Bundle, BundleInfo, Golden, Source, open_bundle
from engines.msda_function import HeadShape, Lowering, make_node, set_lowering

SIZE = (32, 48)
SHAPES = ((4, 6), (2, 3))
HEADS, CHANNELS, POINTS, QUERIES = 2, 4, 3, 5


def toy_model(
    batch: int | Literal["dynamic"],
    lowering: Lowering = "gridsample",
    points: Points = POINTS,
    masks: bool = False,
) -> onnx.ModelProto:
    """Two attentions in a row over pooled pixels; boxes and scores follow from the second.

    The first attention's output moves the second's locations, and one value (the tokens) is used on
    both sides of the cut. With masks, queries are multiplied with pixels of stride 4.
    """
    generator = np.random.default_rng(3)
    width = HEADS * CHANNELS
    sampling = (HEADS, *sample_axes(points, len(SHAPES)))
    of_levels = unequal(points)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array(generator.normal(size=shape).astype(np.float32) / 3, name)

    def ints(name: str, *values: int) -> onnx.TensorProto:
        return numpy_helper.from_array(np.array(values, np.int64), name)

    attention_inputs = ["tokens", "where", "share"]
    nodes = [
        helper.make_node("Conv", ["images", "patch"], ["fine"], strides=[8, 8]),
        helper.make_node("AveragePool", ["fine"], ["coarse"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Reshape", ["fine", "flat"], ["fine_flat"]),
        helper.make_node("Reshape", ["coarse", "flat"], ["coarse_flat"]),
        helper.make_node("Concat", ["fine_flat", "coarse_flat"], ["columns"], axis=2),
        helper.make_node("Transpose", ["columns"], ["rows"], perm=[0, 2, 1]),
        helper.make_node("Reshape", ["rows", "by_head"], ["tokens"]),
        helper.make_node("Shape", ["images"], ["count"], start=0, end=1),
        helper.make_node("Concat", ["count", "query_sizes"], ["query_shape"], axis=0),
        helper.make_node("Expand", ["queries", "query_shape"], ["content"]),
        helper.make_node("MatMul", ["content", "to_where"], ["where_flat"]),
        helper.make_node("Reshape", ["where_flat", "where_sizes"], ["where_raw"]),
        helper.make_node("Sigmoid", ["where_raw"], ["where"]),
        helper.make_node("MatMul", ["content", "to_share"], ["share_flat"]),
        helper.make_node("Reshape", ["share_flat", "share_sizes"], ["share"]),
        make_node(*attention_inputs, "first", SHAPES, "attention_0", of_levels),
        helper.make_node("MatMul", ["first", "to_where"], ["where_flat_2"]),
        helper.make_node("Reshape", ["where_flat_2", "where_sizes"], ["where_2"]),
        make_node("tokens", "where_2", "share", "second", SHAPES, "attention_1", of_levels),
        helper.make_node("Add", ["first", "second"], ["hidden"]),
        helper.make_node("MatMul", ["hidden", "to_box"], ["box_raw"]),
        helper.make_node("Sigmoid", ["box_raw"], ["box_unit"]),
        helper.make_node("Concat", ["original_sizes", "original_sizes"], ["scale_flat"], axis=1),
        helper.make_node("Unsqueeze", ["scale_flat", "one"], ["scale"]),
        helper.make_node("Mul", ["box_ordered" if masks else "box_unit", "scale"], ["boxes"]),
        helper.make_node("ReduceSum", ["hidden", "last"], ["energy"], keepdims=0),
        helper.make_node("Sigmoid", ["energy"], ["scores_all"]),
        helper.make_node("Unsqueeze", ["valid_sizes", "one"], ["valid_3d"]),
        helper.make_node("ReduceSum", ["valid_3d", "last"], ["valid_sum"], keepdims=0),
        helper.make_node("Mul", ["valid_sum", "tiny"], ["valid_tiny"]),
        helper.make_node("Add", ["scores_all", "valid_tiny"], ["scores"]),
        helper.make_node(
            "Cast",
            [
                "scores",
            ],
            ["labels"],
            to=TensorProto.INT64,
        ),
    ]
    if masks:
        nodes += [
            helper.make_node("Conv", ["images", "small_patch"], ["pixel_map"], strides=[4, 4]),
            helper.make_node("Reshape", ["pixel_map", "flat"], ["pixel_rows"]),
            helper.make_node("MatMul", ["hidden", "pixel_rows"], ["masks_flat"]),
            helper.make_node("Reshape", ["masks_flat", "mask_sizes"], ["masks"]),
        ]
        # What a mask is cut to has to have an area.
        at = next(i for i, node in enumerate(nodes) if node.output[0] == "boxes")
        nodes[at:at] = [
            helper.make_node("Split", ["box_unit"], ["one_corner", "other_corner"], axis=2),
            helper.make_node("Min", ["one_corner", "other_corner"], ["low_corner"]),
            helper.make_node("Max", ["one_corner", "other_corner"], ["high_corner"]),
            helper.make_node("Concat", ["low_corner", "high_corner"], ["box_ordered"], axis=2),
        ]
    weights = [
        weight("patch", width, 3, 8, 8),
        weight("queries", 1, QUERIES, width),
        weight("to_where", width, int(np.prod(sampling)) * 2),
        weight("to_share", width, int(np.prod(sampling))),
        weight("to_box", width, 4),
        ints("flat", 0, 0, -1),
        ints("by_head", 0, 0, HEADS, CHANNELS),
        ints("query_sizes", QUERIES, width),
        ints("where_sizes", 0, 0, *sampling, 2),
        ints("share_sizes", 0, 0, *sampling),
        ints("one", 1),
        ints("last", -1),
        numpy_helper.from_array(np.array(1e-3, np.float32), "tiny"),
    ]
    cells = (SIZE[0] // 4, SIZE[1] // 4)
    if masks:
        weights += [weight("small_patch", width, 3, 4, 4), ints("mask_sizes", 0, 0, *cells)]
    first: int | str = "batch" if batch == "dynamic" else batch

    def value(name: str, *shape: int, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, [first, *shape])

    graph = helper.make_graph(
        nodes,
        "toy",
        [value("images", 3, *SIZE), value("valid_sizes", 2), value("original_sizes", 2)],
        [
            value("boxes", QUERIES, 4),
            value("scores", QUERIES),
            value("labels", QUERIES, kind=TensorProto.INT64),
            *([value("masks", QUERIES, *cells)] if masks else []),
        ],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    set_lowering(model, HeadShape(HEADS, CHANNELS, points), lowering)
    onnx.checker.check_model(model, full_check=True)
    return model


MakeBundle = Callable[..., Path]


@pytest.fixture
def toy_bundle(tmp_path: Path) -> MakeBundle:
    """Writes a bundle around :func:`toy_model`, of whose batch size and points it is."""

    def make(
        batch: int | Literal["dynamic"] = "dynamic",
        points: Points = POINTS,
        masks: bool = False,
        **changes: Any,
    ) -> Path:
        folder = tmp_path / "toy.bundle"
        folder.mkdir()
        onnx.save_model(
            toy_model(batch, changes.get("lowering", "gridsample"), points, masks),
            str(folder / MODEL),
        )
        image = np.zeros((20, 30, 3), np.uint8)
        nothing = Detections(
            np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64)
        )
        (folder / GOLDEN).write_bytes(Golden([image], [nothing]).to_bytes())
        info = BundleInfo(
            model=ModelInfo(
                detector=DetectorConfig(num_classes=2),
                classes=ClassMap(names=("car", "tram"), category_ids=(1, 7)),
                preprocess=PreprocessConfig(size=SIZE),
            ),
            opset=17,
            lowering="gridsample",
            batch=batch,
            outputs=("boxes", "scores", "labels", *(["masks"] if masks else [])),
            masks=MaskScaling() if masks else None,
            files={name: sha256(folder / name) for name in (MODEL, GOLDEN)},
            source=Source(path=str(tmp_path / "gone.safetensors"), sha256="0" * 64),
        ).model_copy(update=changes)
        (folder / SIDECAR).write_text(info.model_dump_json())
        return folder

    return make


@pytest.fixture
def sized_bundle(toy_bundle: MakeBundle) -> Bundle:
    """Of a detector with the sizes the hand-written graph has."""
    folder = toy_bundle()
    sidecar = json.loads((folder / SIDECAR).read_text())
    detector = DetectorConfig.model_validate(sidecar["model"]["detector"])
    sizes = {"encoder.points": 3, "decoder.cross_attention.points": 3}
    detector = detector.replace(width=8, attention_heads=2, **sizes)
    sidecar["model"]["detector"] = detector.model_dump(mode="json")
    (folder / SIDECAR).write_text(json.dumps(sidecar))
    return open_bundle(folder)
