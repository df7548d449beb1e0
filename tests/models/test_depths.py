"""Encoders of 0 to 12 layers, decoders of 1 to 12, for every architecture."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from detr.models import build_detector
from detr.presets import FAMILIES


def check(config) -> None:
    torch.manual_seed(0)
    detector = build_detector(config).eval()
    images, valid = torch.randn(1, 3, 64, 96), torch.tensor([[64.0, 90.0]])
    with torch.no_grad():
        memory = detector.encode(images, valid)
        output = detector.decode(memory, detector.queries(memory))[0]
        boxes = detector(images, valid, valid)[0]
    assert len(memory.layers) == config.encoder.layers + 1
    assert len(output.logits) == len(output.boxes) == config.decoder.layers
    assert boxes.shape[0] == 1 and boxes.isfinite().all()


@pytest.mark.parametrize("depth", range(13))
def test_every_depth(depth, small_preset):
    depths = {"encoder.layers": depth, "decoder.layers": max(1, 12 - depth)}
    check(small_preset("deformable-detr-refine", **depths))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_from_shallow_to_deep(family, small_preset):
    check(small_preset(family, **{"encoder.layers": 12, "decoder.layers": 12}))
    shallow = {"encoder.layers": 0, "decoder.layers": 1}
    if family.startswith(("stable-dino", "stable-mask-dino")):
        with pytest.raises(ValidationError, match="needs encoder layers to fuse"):
            small_preset(family, **shallow)
    else:
        check(small_preset(family, **shallow))
