"""LW-DETR and RF-DETR as bundles: one node per layer, one group of queries, every engine alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from engines import open_engine
from engines.msda_function import Lowering, is_attention
from engines.parity import Budget
from export.bundle import export_bundle
from export.parity.compare import compare_detections

# Whole canvases, a wide image and a high one: two of four leave padding.
SIZES = [(64, 96), (33, 200), (90, 60), (128, 192)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "lowering"),
    [("lwdetr", "gather"), ("lwdetr", "gridsample"), ("rfdetr", "gather")],
)
def test_every_engine_finds_what_torch_finds(
    family: str, lowering: Lowering, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    bundle = export_bundle(checkpoint(family), tmp_path / "x.bundle", lowering=lowering)
    graph = onnx.load(str(bundle.model)).graph
    layers = bundle.info.model.detector.decoder.layers
    assert sum(map(is_attention, graph.node)) == layers
    # Groups only teach.
    names = [*(node.name for node in graph.node), *(x.name for x in graph.initializer)]
    assert not any("source.further" in name for name in names)
    kinds = Counter(node.op_type for node in graph.node)
    assert kinds["BatchNormalization"] == kinds["Resize"] == 0
    # Boxes never move, so neither do positions: their network runs once.
    assert sum("source.reference_mlp" in node.name for node in graph.node) <= 8

    generator = np.random.default_rng(5)
    images = [generator.integers(0, 255, (*size, 3)).astype(np.uint8) for size in SIZES]
    wanted = [found for image in images for found in open_engine(bundle.path, "torch")([image])]
    # Random weights are timid: what counts is each image's best dozen.
    threshold = min(float(one.scores[11]) for one in wanted)
    budget = Budget(threshold=threshold, box_px=0.02, score=1e-5)
    for engine in ("onnxruntime", "native", "openvino"):
        found = [one for image in images for one in open_engine(bundle.path, engine)([image])]
        parity = compare_detections(wanted, found, budget)
        assert parity.detections >= 12 * len(wanted)
        assert parity.violations(budget) == [], engine
