"""Students of six families become TensorRT-RTX engines, without a GPU.

Real exports and real builds in every precision, for two GPU architectures; that the engines answer
rightly is for a machine with such a GPU (``make gpu-check``).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

from detr.config import AnyVitConfig
from engines.bundle import Bundle, Precision
from engines.evidence import trusted_artifact
from engines.msda_function import is_attention
from engines.open import open_engine
from engines.trt import build as builder
from engines.trt import dla
from engines.trt.backend import BACKENDS
from engines.trt.build import BuildOptions, build_engine
from engines.trt.lowering import lowered_model
from export import bundle as onnx_export
from export.deploy.tensorrt import refuse_known_bad
from export.golden import drawn_images
from export.precision.apply import PrecisionRequest

pytest.importorskip("tensorrt_rtx")

MakeCheckpoint = Callable[..., Path]
MakeBundle = Callable[[Precision], Bundle]
STUDENTS = ("dino", "deformable-two-stage", "rtdetr", "d-fine", "lwdetr", "rfdetr", "dino-masks")
# Convolutions behind an attention.
BEHIND = ("encoder.", "pixels.narrow", "pixels.output", "pixels.project")
# Of an encoder's, those that read a map of the backbone's.
FINER = re.compile(r"encoder\.top_down\.\d+\.(way|shortcut|first)\.conv/")
RTX = BACKENDS["tensorrt-rtx"]


@pytest.fixture(scope="module", params=STUDENTS)
def student(
    request: pytest.FixtureRequest,
    checkpoint: MakeCheckpoint,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[MakeBundle]:
    """Bundles of one student; it is traced once, which takes longer than everything else."""
    path = checkpoint(request.param)
    folder = tmp_path_factory.mktemp("students")
    traced: list[onnx.ModelProto] = []
    trace = onnx_export.export_graph

    def once(*arguments: object) -> onnx.ModelProto:
        if not traced:
            traced.append(trace(*arguments))  # type: ignore[arg-type]
        copy = onnx.ModelProto()
        copy.CopyFrom(traced[0])
        return copy

    def make(precision: Precision) -> Bundle:
        images = drawn_images((64, 96))[:2]
        wanted = PrecisionRequest(precision, calibration=images if precision == "int8" else ())
        out = folder / f"{request.param}-{precision}.bundle"
        # Lower precision swaps ranks among the nearly equal scores of random weights, which is no
        # defect; test_trt_trained.py judges a detector that was trained.
        prove = precision == "fp32"
        return onnx_export.export_bundle(path, out, 17, 1, "gridsample", images, wanted, prove)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_export, "export_graph", once)
        yield make


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_student_is_built_for_two_architectures(
    student: MakeBundle, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "compute_capability", lambda: None)
    bundle = student(precision)
    if precision == "int8":
        images = drawn_images((64, 96))[:2]
        expected, found = (
            [x for image in images for x in open_engine(path, name)([image])]
            for path, name in (
                (Path(bundle.info.source.path), "torch"),
                (bundle.path, "onnxruntime"),
            )
        )
        # By rank and not by box: which of two nearly equal queries of random weights comes first,
        # the processor's rounding decides. Boxes are judged where weights are trained.
        for one, other in zip(expected, found, strict=True):
            ranks = [np.sort(x.scores)[::-1] for x in (one, other)]
            if one.masks is not None:
                # A mask of which rounding leaves no pixel has the score 0; elsewhere none has.
                fewest, most = sorted(np.count_nonzero(scores) for scores in ranks)
                assert most - fewest <= 1
                ranks = [scores[:fewest] for scores in ranks]
            assert np.abs(ranks[0] - ranks[1]).max() < 0.02
    options = BuildOptions(compute_capabilities=(86, 89))
    refuse_known_bad(bundle, RTX, options)
    built = build_engine(bundle, RTX, options)

    trusted = trusted_artifact(built.folder)
    path, evidence = trusted.path, trusted.evidence
    assert path.parent.name == f"tensorrt-rtx-sm86-89-{precision}"
    assert evidence.build is not None
    assert evidence.build.compute_capabilities == (86, 89)
    assert evidence.build.precision == precision and evidence.build.lowering == "gather"
    assert path.stat().st_size > 100_000

    # What a Jetson's accelerator would get: every convolution, in every precision, and no token; of
    # a hybrid encoder those that read a finer map, since all others follow its attention; of a mask
    # head the one that reads the backbone's map alone.
    model = lowered_model(bundle, "gather")
    kinds = {node.name: node.op_type for node in model.graph.node}
    accelerated = dla.front(model)
    # All of a vision transformer's maps follow attention.
    transformer = isinstance(bundle.info.model.detector.backbone, AnyVitConfig)
    behind = (*BEHIND, "neck.") if transformer else BEHIND
    assert len(set(accelerated)) == len(accelerated)
    assert {n for n in accelerated if kinds[n] == "Conv"} == {
        name
        for name, kind in kinds.items()
        if kind == "Conv" and (FINER.match(name) or not name.startswith(behind))
    }
    assert not any(name.startswith("attention") or kinds[name] == "MatMul" for name in accelerated)

    assert built.layers.source == "builder" and 0 < built.layers.count < len(built.layers.layers)
    layers = built.layers.layers
    types = Counter(layer.outputs[0] for layer in layers)
    norms = [layer for layer in layers if layer.kind == "NORMALIZATION"]
    attention = [layer for layer in layers if "/gathernd" in layer.name]
    nodes = sum(map(is_attention, onnx.load(str(bundle.model)).graph.node))
    assert norms and nodes >= 2 and len(attention) == 4 * nodes, "four look-ups for each attention"
    # What the island keeps is in FP32 in every precision, because the network is strongly typed.
    assert {layer.outputs[0] for layer in norms} == {"FLOAT"}
    if precision == "fp32":
        assert not {"HALF", "INT8"} & set(types)
    else:
        assert types["HALF"] > 20
    quantized = [layer for layer in layers if layer.kind == "QUANTIZE"]
    assert bool(quantized) == (precision == "int8")
    assert all(layer.outputs == ("INT8",) for layer in quantized)
    if bundle.info.masks is not None:
        graph = onnx.load(str(bundle.model)).graph
        integer = [node.name for node in graph.node if node.op_type == "DequantizeLinear"]
        assert not [name for name in integer if "mask_heads" in name or "pixels.project" in name]
        # The product of queries and pixels is in FP32 in every precision.
        products = [layer for layer in layers if layer.name.lower().startswith("/einsum")]
        assert products and {layer.outputs[0] for layer in products} == {"FLOAT"}
