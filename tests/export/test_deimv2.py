"""DEIMv2 as a bundle, over DINOv3 and the smallest: one node per layer, every engine alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from engines.bundle import Bundle
from engines.msda_function import is_attention
from export.bundle import export_bundle


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deimv2", "deimv2-lite"])
def test_every_engine_finds_what_torch_finds(
    name: str,
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    engines_agree: Callable[[Bundle], None],
) -> None:
    bundle = export_bundle(checkpoint(name), tmp_path / "x.bundle")
    graph = onnx.load(str(bundle.model)).graph
    decoder = bundle.info.model.detector.decoder
    assert sum(map(is_attention, graph.node)) == decoder.answering_layers == 2
    kinds = Counter(node.op_type for node in graph.node)
    assert kinds["BatchNormalization"] == 0
    # Angles and places follow from the canvas.
    assert kinds["Cos"] == kinds["Sin"] == 0

    engines_agree(bundle)
