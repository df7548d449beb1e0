"""What a detector says of itself as a teacher is what it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from detr.config import DetectorConfig
from detr.models import build_detector
from detr.models.protocol import WITHOUT_MASKS


@pytest.mark.parametrize(
    "family", ["detr", "conditional-detr", "dab-detr-patterns", "deformable-detr", "dino"]
)
def test_facts_are_what_it_does(family: str, small_preset: Callable[..., DetectorConfig]) -> None:
    detector = build_detector(small_preset(family), pretrained=False).eval()
    facts = detector.facts
    with torch.no_grad():
        memory = detector.encode(torch.zeros(1, 3, 128, 128), torch.tensor([[128.0, 128.0]]))
        groups = detector.queries(memory)
        maps: Any = {"attention": True, "self_attention": ["own"]}
        (output,) = detector.decode(memory, groups, **maps)
    (own,) = groups
    assert detector.offers == WITHOUT_MASKS
    assert own.content.shape[1:] == (facts.num_queries, facts.width)
    assert memory.tokens.shape[-1] == facts.width
    assert len(memory.layers) == facts.encoder_layers + 1
    assert tuple(128 // height for height, _ in memory.shapes) == facts.strides
    assert tuple(x.shape[1] for x in memory.features) == facts.backbone_channels
    assert tuple(128 // x.shape[-1] for x in memory.features) == facts.backbone_strides
    assert len(output.logits) == facts.decoder_layers
    assert output.self_attention[0].shape[1] == facts.heads
    assert output.no_object == (facts.scores == "softmax")
    assert output.logits[0].shape[-1] == facts.num_classes + output.no_object
    assert (own.position is not None) == (facts.query_start == "points")
    assert not facts.blank_content or bool((own.content == own.content[:, :1]).all())
    if facts.query_start == "points":
        assert own.position is not None
        torch.testing.assert_close(detector.reference_of(own.position), own.reference)
    assert (detector.class_contents() is None) == (detector.denoiser is None)
