"""RT-DETR as a bundle: one node per decoder layer, fused convolutions, every engine alike."""

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
    ("name", "lowering"),
    [("rtdetr", "gather"), ("rtdetr-discrete", "gridsample"), ("rtdetr-unequal", "gather")],
)
def test_every_engine_finds_what_torch_finds(
    name: str,
    lowering: Lowering,
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    engines_agree: Callable[[Bundle], None],
) -> None:
    bundle = export_bundle(checkpoint(name), tmp_path / "x.bundle", lowering=lowering)
    graph = onnx.load(str(bundle.model)).graph
    kinds = Counter(node.op_type for node in graph.node)
    assert sum(map(is_attention, graph.node)) == bundle.info.model.detector.decoder.layers
    assert kinds["BatchNormalization"] == 0
    # Of a RepVGG block's two convolutions one is left.
    convolutions = [n.name for n in graph.node if n.op_type == "Conv" and ".blocks." in n.name]
    assert len(convolutions) == 4 and all(".large.conv/" in name for name in convolutions)

    engines_agree(bundle)
