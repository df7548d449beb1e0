"""Architectures and kinds of backbones export, and ONNX Runtime finds what torch finds.

``DETR_EVERY_EXPORT=1`` adds every family of presets as it is.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from detr.config import ClassMap
from detr.data.preprocess import PreprocessConfig
from detr.model_info import ModelInfo
from detr.models import build_detector, save_model
from detr.models.presets import FAMILIES
from engines import open_engine
from export.onnx_export import export_bundle
from export.parity import Budget, compare

SIZE = (64, 96)
SWIN = {"embed_dim": 8, "depths": (2, 1, 1, 1), "num_heads": (1, 1, 2, 2)}
BACKBONES: dict[str, dict[str, Any]] = {
    "swin": {"name": "swin_tiny_patch4_window7_224", "map_norm": True, "options": SWIN},
    "convnext": {
        "name": "convnext_atto",
        "options": {"dims": (8, 16, 32, 32), "depths": (1, 1, 1, 1)},
    },
    "mobilenetv4": {"name": "mobilenetv4_conv_small_035"},
    "hgnetv2": {"name": "hgnetv2_b0"},
}
# What differs in its graph, several things at a time, beside what test_onnx_export has.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "softmax, swin": ("detr", {"backbone": BACKBONES["swin"]}),
    "conditional, convnext": ("conditional-detr", {"backbone": BACKBONES["convnext"]}),
    "patterns, mobilenetv4": ("dab-detr-patterns", {"backbone": BACKBONES["mobilenetv4"]}),
    "deformable anchors, hgnetv2": ("dn-deformable-detr", {"backbone": BACKBONES["hgnetv2"]}),
    "one to many": ("h-deformable-detr", {}),
    "5-scale, fusion u": ("dino-5scale", {"memory_fusion": "u", "encoder_layers": 2}),
    "shared decoder, fusion dense": ("deformable-detr-shared", {"memory_fusion": "dense"}),
}
if "DETR_EVERY_EXPORT" in os.environ:  # a quarter of an hour
    CASES |= {family: (family, {}) for family in FAMILIES}
    CASES["random anchors"] = ("dab-detr", {"random_anchors": True})
    CASES["fusion simple"] = ("dino", {"memory_fusion": "simple"})


@pytest.mark.parametrize("case", CASES)
def test_runtimes_agree(case: str, small_preset: Any, tmp_path: Path) -> None:
    family, changes = CASES[case]
    config = small_preset(family, **changes)
    torch.manual_seed(1)
    detector = build_detector(config).eval()
    with torch.no_grad():
        # Fresh heads and offsets are zero: every box would be its reference.
        for name, parameter in detector.named_parameters():
            if parameter.ndim == 2 or name.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    info = ModelInfo(
        detector=config,
        classes=ClassMap(names=("a", "b", "c"), category_ids=(1, 2, 3)),
        preprocess=PreprocessConfig(size=SIZE),
    )
    save_model(tmp_path / "x.safetensors", detector, info)
    # Proves itself on drawn images, one by one and together.
    bundle = export_bundle(tmp_path / "x.safetensors", tmp_path / "x.bundle", batch="dynamic")
    generator = np.random.default_rng(5)
    # The whole canvas, padding below it and padding beside it.
    images = [
        generator.integers(0, 255, (*size, 3)).astype(np.uint8)
        for size in [(64, 96), (33, 200), (90, 60)]
    ]
    wanted = open_engine(bundle.path, "torch")(images)
    found = open_engine(bundle.path, "onnxruntime")(images)
    # Random weights are timid: what counts is each image's best dozen.
    threshold = min(float(image.scores[11]) for image in wanted)
    budget = Budget(threshold=threshold, box_px=0.02, score=1e-5)
    parity = compare(wanted, found, budget)
    assert parity.detections >= 36
    assert parity.over(budget) == []
