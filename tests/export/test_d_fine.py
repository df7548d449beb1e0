"""D-FINE as a bundle: one node per layer that answers, unequal points, every engine alike."""

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
@pytest.mark.parametrize("lowering", ["gather", "gridsample"])
def test_every_engine_finds_what_torch_finds(
    lowering: Lowering,
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    engines_agree: Callable[[Bundle], None],
) -> None:
    bundle = export_bundle(checkpoint("d-fine"), tmp_path / "x.bundle", lowering=lowering)
    graph = onnx.load(str(bundle.model)).graph
    decoder = bundle.info.model.detector.decoder
    # The last layer only taught: neither it nor any other layer's heads but the second's are there.
    assert (decoder.layers, decoder.answering_layers) == (3, 2)
    assert sum(map(is_attention, graph.node)) == 2
    names = [*(node.name for node in graph.node), *(x.name for x in graph.initializer)]
    assert not any("decoder.layers.2" in name or "qualities.0" in name for name in names)
    kinds = Counter(node.op_type for node in graph.node)
    assert kinds["BatchNormalization"] == 0
    # Of a RepVGG block's two convolutions one is left; two ways in each of four blocks.
    convolutions = [n.name for n in graph.node if n.op_type == "Conv" and ".blocks." in n.name]
    assert len(convolutions) == 8 and all(".large.conv/" in name for name in convolutions)

    engines_agree(bundle)
