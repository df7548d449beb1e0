"""LW-DETR and RF-DETR as bundles: one node per layer, one group of queries, every engine alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from engines.bundle import Bundle
from engines.msda_function import Lowering, is_attention
from export.bundle import export_bundle


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "lowering"),
    [("lwdetr", "gather"), ("lwdetr", "gridsample"), ("rfdetr", "gather")],
)
def test_every_engine_finds_what_torch_finds(
    family: str,
    lowering: Lowering,
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    engines_agree: Callable[[Bundle], None],
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

    engines_agree(bundle)
