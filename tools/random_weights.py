"""Checkpoints of presets with random weights, which cost what trained ones cost."""

from __future__ import annotations

from pathlib import Path

import torch

from detr.config import ClassMap
from detr.data import PreprocessConfig
from detr.model_info import ModelInfo
from detr.models import Detector, build_detector, save_model
from detr.presets import preset

CLASSES = 80


def save_random(name: str, size: tuple[int, int], path: Path) -> Detector:
    """Writes the checkpoint of a preset with COCO's number of classes; the same each time.

    Args:
        name: Of the preset.
        size: Canvas (height, width).
        path: ``NAME.safetensors``.

    Returns:
        The detector that was written.
    """
    torch.manual_seed(0)
    config = preset(name, CLASSES, pretrained=False)
    detector = build_detector(config, pretrained=False).eval()
    names = tuple(f"class{i}" for i in range(CLASSES))
    info = ModelInfo(
        detector=config,
        classes=ClassMap(names=names, category_ids=tuple(range(1, CLASSES + 1))),
        preprocess=PreprocessConfig(size=size),
    )
    save_model(path, detector, info)
    return detector
