"""Sizes of the detectors over vision transformers: what each changes of its family's config.

Constants are those of Atten4Vis/LW-DETR, Intellindust-AI-Lab/DEIMv2 and roboflow/rf-detr; of the
latter the sizes whose weights are under Apache 2.0 (XL and 2XL are not).
"""

from __future__ import annotations

from typing import Any

from detr.config import (
    Dinov2BackboneConfig,
    Dinov3BackboneConfig,
    ProjectorNeckConfig,
    VitBackboneConfig,
)

_LW_VIT = VitBackboneConfig(width=192, windowed=(0, 1, 3, 6, 7, 9), taps=(3, 5, 6, 10))
_LW_DETR_LARGE: dict[str, Any] = {
    "width": 384,
    "attention_heads": 12,
    "neck": ProjectorNeckConfig(scales=(2.0, 0.5)),
    "decoder": {"cross_attention": {"points": 4, "heads": 24}},
}
LW_DETR_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "backbone": _LW_VIT.replace(windowed=(0, 2, 4), taps=(2, 4, 6)),
        "neck": ProjectorNeckConfig(),
        "queries": {"number": 100},
        "detections": 100,
    },
    "small": {"backbone": _LW_VIT, "neck": ProjectorNeckConfig()},
    "medium": {"backbone": _LW_VIT.replace(width=384), "neck": ProjectorNeckConfig()},
    "large": {"backbone": _LW_VIT.replace(width=384, drop_path=0.1), **_LW_DETR_LARGE},
    "xlarge": {"backbone": _LW_VIT.replace(width=768, drop_path=0.1), **_LW_DETR_LARGE},
}
_DINOV2 = Dinov2BackboneConfig(
    patch=16, windows=2, windowed=(0, 1, 2, 4, 5, 7, 8, 10, 11), taps=(3, 6, 9, 12)
)
_RF_NECK = ProjectorNeckConfig(norm="layer")
# As many positions as cells of the canvas it was trained on, and decoder layers.
RF_DETR_SIZES: dict[str, dict[str, Any]] = {
    name: {
        "backbone": _DINOV2.replace(side=side),
        "neck": _RF_NECK,
        "decoder": {"layers": layers},
    }
    for name, side, layers in (
        ("nano", 24, 2),
        ("small", 32, 3),
        ("medium", 36, 4),
        ("large", 44, 4),
    )
}
RF_DETR_SIZES["base"] = {
    "backbone": Dinov2BackboneConfig(
        patch=14, windows=4, windowed=(0, 1, 3, 4, 6, 7, 9, 10), taps=(2, 5, 8, 11)
    ),
    "neck": _RF_NECK,
}
# Distilled from DINOv3: no registers, scales or last norm.
_TINY = Dinov3BackboneConfig(
    width=192,
    heads=3,
    taps=(4, 8, 12),
    ffn=768,
    registers=0,
    first_scale=None,
    final_norm=False,
    norm_eps=1e-6,
)
DEIMV2_VIT_SIZES: dict[str, dict[str, Any]] = {
    "s": {
        "width": 192,
        "backbone": _TINY,
        "encoder": {"ffn": 512, "expansion": 0.34, "blocks": 2},
        "decoder": {"layers": 4, "ffn": 256},
    },
    "m": {
        "backbone": _TINY.replace(width=256, heads=4, ffn=1024),
        "encoder": {"ffn": 512, "expansion": 0.67},
        "decoder": {"layers": 4, "ffn": 256},
    },
    "l": {
        "width": 224,
        "backbone": Dinov3BackboneConfig(detail=32),
        "encoder": {"ffn": 896},
        "decoder": {"layers": 4, "ffn": 896},
    },
    "x": {
        "backbone": Dinov3BackboneConfig(detail=64, activation="swiglu"),
        "encoder": {"expansion": 1.25, "blocks": 4},
    },
}
