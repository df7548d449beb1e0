"""Healthy exports pass the gate: detectors, seeds, opsets, attention bodies and batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper

from detr.files import sha256
from detr.types import Detections
from engines.bundle import GOLDEN, MODEL, Bundle, BundleInfo, Golden, Source
from engines.msda_function import head_shape, set_lowering
from engines.ort_engine import OrtEngine
from engines.torch_engine import TorchEngine
from export.golden import drawn_images
from export.parity.budget import default_budget
from export.parity.engines import engine_verdicts
from export.parity.first_deviation import TOLERANCE, boundaries, difference, torch_values
from export.parity.samples import Samples
from export.trace.opset17 import lower_to_17
from export.trace.torch_to_onnx import export_graph

MakeCheckpoint = Callable[..., Path]
Batch = int | Literal["dynamic"]
BATCHES: dict[str, Batch] = {
    "deformable": 1,
    "deformable-refine": 3,
    "deformable-two-stage": "dynamic",
    "dino": "dynamic",
    "dino-no-encoder": 2,
}


@pytest.fixture(scope="module", params=BATCHES)
def traced(
    request: pytest.FixtureRequest, checkpoint: MakeCheckpoint
) -> tuple[TorchEngine, ModelProto, Batch, Golden]:
    reference = TorchEngine(checkpoint(request.param))
    size, batch = reference.info.preprocess.canvases[0], BATCHES[request.param]
    model = export_graph(reference.detector, size, 18, batch, "gridsample")
    # Upside down as well: eight images give forty detections to judge by.
    images = [image[::-1].copy() for image in drawn_images(size)] + drawn_images(size)
    found: list[Detections] = [reference([image])[0] for image in images]
    return reference, model, batch, Golden(images, found)


def bundle_of(
    model: ModelProto, reference: TorchEngine, batch: Batch, opset: int, folder: Path
) -> Bundle:
    folder.mkdir()
    onnx.save(model, str(folder / MODEL))
    info = BundleInfo(
        model=reference.info,
        opset=opset,
        lowering="gridsample",
        batch=batch,
        files={MODEL: sha256(folder / MODEL), GOLDEN: ""},
        source=Source(path=str(reference.artifact), sha256=""),
    )
    return Bundle(folder, info)


@pytest.mark.slow
@pytest.mark.parametrize("opset", [17, 18])
@pytest.mark.parametrize("lowering", ["gridsample", "gather"])
def test_healthy_graphs_are_accepted(
    traced: tuple[TorchEngine, ModelProto, Batch, Golden],
    opset: int,
    lowering: Literal["gridsample", "gather"],
    tmp_path: Path,
) -> None:
    reference, original, batch, golden = traced
    model = ModelProto()
    model.CopyFrom(original)
    if opset == 17:
        lower_to_17(model)
    config = reference.info.detector
    heads = head_shape(config)
    set_lowering(model, heads, lowering)
    bundle = bundle_of(model, reference, batch, opset, tmp_path / "x.bundle")
    samples = Samples.of_golden(golden)
    # Random weights are timid: what counts is chosen so that five of each image do.
    threshold = min(float(found.scores[4]) for found in golden.detections)
    budget = default_budget("fp32").model_copy(update={"threshold": threshold})
    verdict = engine_verdicts(bundle, reference, [OrtEngine(bundle)], samples, budget)[0]
    assert verdict.status == "accepted", verdict.text()


@pytest.mark.slow
def test_every_layer_can_be_compared(
    traced: tuple[TorchEngine, ModelProto, Batch, Golden], tmp_path: Path
) -> None:
    reference, model, batch, golden = traced
    bundle = bundle_of(model, reference, batch, 18, tmp_path / "x.bundle")
    wanted = boundaries(model.graph)
    inputs = reference.prepare(golden.images[:1] * (1 if batch == "dynamic" else batch))
    found = OrtEngine(bundle).intermediates(inputs, [boundary.value for boundary in wanted])
    expected = torch_values(reference, inputs, wanted)
    assert found is not None
    modules = {boundary.module for boundary in wanted if boundary.value in expected}
    assert {"decoder.layers.1.cross_attention.output_proj", "decoder.layers.0.ffn.norm"} <= modules
    for name, value in expected.items():
        if name in found and found[name].shape == value.shape:
            assert difference(value, found[name]) < TOLERANCE["fp32"] / 10, name


def test_a_module_one_call_of_which_ends_in_two_values_is_left_out() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], "m/Relu_0"),
        helper.make_node("Neg", ["x"], ["b"], "m/Neg_0"),
        helper.make_node("Add", ["a", "b"], ["c"], "n/Add_0"),
        helper.make_node("QuantizeLinear", ["c", "s"], ["c8"], "m/Q_0"),
        helper.make_node("DequantizeLinear", ["c8", "s"], ["c_"], "m/DQ_0"),
        helper.make_node("Relu", ["c_"], ["d"], "m/Relu_1"),
        helper.make_node("Sub", ["c_", "d"], ["y"], "p/Sub_0"),
    ]
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph(nodes, "g", [], [y])
    assert [(b.module, b.call, b.value) for b in boundaries(graph)] == [
        ("n", 0, "c"),
        ("p", 0, "y"),
    ]
    # A pair has other readers than the module it is called after.
    alone = helper.make_graph(nodes[2:], "g", [], [y])
    assert ("m", 0, "d") in [(b.module, b.call, b.value) for b in boundaries(alone)]


def test_rows_in_another_order_are_no_deviation() -> None:
    rows = np.random.default_rng(0).normal(size=(2, 30, 8))
    assert difference(rows, rows[:, ::-1] + 1e-6) < 1e-3
    assert difference(rows, rows[:, ::-1] + 0.1) > 1e-2
    assert difference(rows, np.full_like(rows, np.nan)) == np.inf


def test_a_clipped_tail_is_no_deviation_of_int8() -> None:
    values = np.random.default_rng(0).normal(size=(1, 4, 30, 30)).astype(np.float32)
    clipped = np.clip(values, -2.5, 2.5)
    limit = TOLERANCE["int8"]
    assert difference(values, clipped, "int8") < limit < difference(values, clipped, "fp16")
    assert difference(values, values[:, ::-1], "int8") > limit, "channels in another order"
    assert difference(values, np.where(values > 2, np.nan, values), "int8") == np.inf
