"""DEIMv2 as a bundle, over DINOv3 and the smallest: one node per layer, every engine alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from engines import open_engine
from engines.msda_function import is_attention
from engines.parity import Budget
from export.bundle import export_bundle
from export.parity.compare import compare_detections

# Whole canvases, a wide image and a high one: two of four leave padding.
SIZES = [(64, 96), (33, 200), (90, 60), (128, 192)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deimv2", "deimv2-lite"])
def test_every_engine_finds_what_torch_finds(
    name: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    bundle = export_bundle(checkpoint(name), tmp_path / "x.bundle")
    graph = onnx.load(str(bundle.model)).graph
    decoder = bundle.info.model.detector.decoder
    assert sum(map(is_attention, graph.node)) == decoder.answering_layers == 2
    kinds = Counter(node.op_type for node in graph.node)
    assert kinds["BatchNormalization"] == 0
    # Angles and places follow from the canvas.
    assert kinds["Cos"] == kinds["Sin"] == 0

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
