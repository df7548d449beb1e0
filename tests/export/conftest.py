"""Random-weight detectors, small enough that an export takes seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from detr.config import BackboneConfig, ClassMap, DetectorConfig
from detr.data.preprocess import PreprocessConfig
from detr.model_info import ModelInfo
from detr.models import Detector, build_detector, save_model

SIZE = (64, 96)
DETECTORS: dict[str, dict[str, Any]] = {
    "deformable": {"query": "learned", "refine": "none"},
    "deformable-refine": {"query": "learned", "refine": "detach"},
    "deformable-two-stage": {"query": "two_stage", "refine": "detach"},
    "dino": {"query": "mixed", "refine": "look_forward_twice", "shared_heads": True},
    "dino-no-encoder": {"query": "mixed", "refine": "look_forward_twice", "encoder_layers": 0},
}

MakeCheckpoint = Callable[..., Path]


@pytest.fixture(scope="session")
def build() -> Callable[[DetectorConfig], Detector]:
    """Builds a seeded detector whose boxes differ: fresh heads and offsets are zero."""

    def make(config: DetectorConfig) -> Detector:
        torch.manual_seed(1)
        detector = build_detector(config).eval()
        with torch.no_grad():
            for name, parameter in detector.named_parameters():
                if parameter.ndim == 2 or name.endswith("bias"):
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return detector

    return make


@pytest.fixture(scope="session")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory, build: Callable[[DetectorConfig], Detector]
) -> MakeCheckpoint:
    """Writes the checkpoint of one of :data:`DETECTORS`; the same file each time."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def make(name: str) -> Path:
        path = folder / f"{name}.safetensors"
        if path.exists():
            return path
        options = {"encoder_layers": 1, "decoder_layers": 2} | DETECTORS[name]
        config = DetectorConfig(
            num_classes=3,
            backbone=BackboneConfig(name="test_resnet", strides=(8, 16)),
            levels=3,
            width=32,
            heads=4,
            points=2,
            ffn=48,
            queries=12,
            detections=20,
            **options,
        )
        info = ModelInfo(
            detector=config,
            classes=ClassMap(names=("a", "b", "c"), category_ids=(1, 2, 3)),
            preprocess=PreprocessConfig(size=SIZE),
            provenance={"ap": 0.25},
        )
        save_model(path, build(config), info)
        return path

    return make
