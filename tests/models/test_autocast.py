"""Under autocast networks compute in half precision; boxes and what they start from do not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from detr.config import DetectorConfig
from detr.models import build_detector
from detr.presets import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_boxes_of_every_layer_stay_in_float32(
    small_preset: Callable[..., DetectorConfig], family: str
) -> None:
    """bfloat16 has eight bits: on a canvas of 1333 pixels a box would move in steps of five."""
    torch.manual_seed(0)
    detector = build_detector(small_preset(family), pretrained=False).eval()
    sizes = torch.tensor([[64.0, 96.0]])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        memory = detector.encode(torch.randn(1, 3, 64, 96), sizes)
        (output,) = detector.decode(memory, detector.queries(memory))
    assert output.logits[-1].dtype == torch.bfloat16, "autocast was not on"
    assert {boxes.dtype for boxes in output.boxes} == {torch.float32}
    assert {group.dtype for group in output.references} == {torch.float32}
