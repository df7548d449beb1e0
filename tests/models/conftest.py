"""Tiny detectors and batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from detr.config import (
    BackboneConfig,
    DecoderConfig,
    DeformableEncoderConfig,
    DetectorConfig,
    LearnedQueriesConfig,
)
from detr.models import Detector, Target, build_detector

TINY_BACKBONE = BackboneConfig(
    name="resnet18", options={"channels": (8, 16, 32, 32), "layers": (1, 1, 1, 1)}
)
DINO = {
    "queries": {"kind": "mixed", "number": 12},
    "decoder": {"refinement": {"kind": "look_forward_twice"}, "final_norm": True},
}
REFINED = {"decoder.refinement": {"kind": "detach"}}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "refine": REFINED,
    "two_stage": {**REFINED, "queries": {"kind": "two_stage", "number": 12}},
    "dino": {**DINO, "queries.denoising": {"number": 6}},
    "dino_shared": {**DINO, "decoder.refinement.shared_heads": True},
}

Make = Callable[..., Detector]


def tiny_config(kind: str, **changes: Any) -> DetectorConfig:
    base = DetectorConfig(
        num_classes=3,
        width=32,
        attention_heads=4,
        backbone=TINY_BACKBONE,
        encoder=DeformableEncoderConfig(layers=2, ffn=64),
        queries=LearnedQueriesConfig(number=12),
        decoder=DecoderConfig(layers=2, ffn=64),
        detections=20,
    )
    return base.replace(**{**KINDS[kind], **changes})


def _jitter(detector: Detector) -> None:
    """Moves zero-initialized parameters, so that no path is tested at a special point."""
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)


@pytest.fixture
def make() -> Make:
    """Builds a seeded tiny detector in evaluation mode: ``make(kind, **config changes)``."""

    def build(kind: str, jitter: bool = True, **changes: Any) -> Detector:
        torch.manual_seed(0)
        detector = build_detector(tiny_config(kind, **changes))
        if jitter:
            _jitter(detector)
        return detector.eval()

    return build


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Images 96 x 160, the first padded, with valid and original sizes."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, 96, 160, generator=generator)
    images[0, :, 80:] = 0
    images[0, :, :, 130:] = 0
    return (
        images,
        torch.tensor([[80.0, 130.0], [96.0, 160.0]]),
        torch.tensor([[160.0, 260.0], [96.0, 160.0]]),
    )


@pytest.fixture
def targets() -> list[Target]:
    """One image with three boxes, one without any."""
    return [
        Target(
            torch.tensor([[0.3, 0.4, 0.2, 0.2], [0.7, 0.6, 0.3, 0.5], [0.5, 0.5, 0.1, 0.1]]),
            torch.tensor([0, 1, 2]),
            torch.zeros(0, 4),
        ),
        Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4)),
    ]
