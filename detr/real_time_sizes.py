"""Sizes of RT-DETR, D-FINE and DEIMv2: their backbones, and what each changes of its family.

Constants are those of lyuwenyu/RT-DETR, Peterande/D-FINE and Intellindust-AI-Lab/DEIMv2.
"""

from __future__ import annotations

from typing import Any

# The sizes of D-FINE: HGNetv2 and its ImageNet weights before they are refined on small pictures.
HGNET: dict[str, tuple[str, str | None]] = {
    "n": ("hgnetv2_b0", "hub:hgnetv2_b0.ssld_stage1_in22k_in1k"),
    "s": ("hgnetv2_b0", "hub:hgnetv2_b0.ssld_stage1_in22k_in1k"),
    "m": ("hgnetv2_b2", "hub:hgnetv2_b2.ssld_stage1_in22k_in1k"),
    "l": ("hgnetv2_b4", "hub:hgnetv2_b4.ssld_stage1_in22k_in1k"),
    "x": ("hgnetv2_b5", "hub:hgnetv2_b5.ssld_stage1_in22k_in1k"),
}
# Of DEIMv2, over smaller ones. Pico's and Femto's stages are among B0's; Atto's third is another.
_B0 = "hub:hgnetv2_b0.ssld_stage1_in22k_in1k"
SMALL_HGNET: dict[str, tuple[str, str | None]] = {
    "atto": ("hgnetv2_atto", None),
    "femto": ("hgnetv2_femto", _B0),
    "pico": ("hgnetv2_b0", _B0),
    "n": ("hgnetv2_b0", _B0),
}
# What a family changes with its backbone. RT-DETR trains all of its small backbones.
SMALL_VD = {"norm": "train", "frozen_stages": 0, "first_projection": True}
_SMALL_RT_DETR = {"backbone": SMALL_VD, "encoder": {"expansion": 0.5}}
RT_DETR_SIZES: dict[str, dict[str, Any]] = {
    "r18": {**_SMALL_RT_DETR, "decoder": {"layers": 3}},
    "r34": {**_SMALL_RT_DETR, "decoder": {"layers": 4}},
    "r101": {"encoder": {"width": 384, "ffn": 2048}},
}
TRAINED = {"norm": "train", "frozen_stages": 0}
D_FINE_SIZES: dict[str, dict[str, Any]] = {
    "n": {
        "width": 128,
        "backbone": {**TRAINED, "strides": (16, 32)},
        "neck": {"levels": 2},
        "encoder": {"ffn": 512, "expansion": 0.34, "blocks": 2},
        "decoder": {"layers": 3, "ffn": 512, "cross_attention": {"points": 6}},
    },
    "s": {
        "backbone": TRAINED,
        "encoder": {"expansion": 0.5, "blocks": 1},
        "decoder": {"layers": 3},
    },
    "m": {"backbone": TRAINED, "encoder": {"blocks": 2}, "decoder": {"layers": 4}},
    "x": {
        "encoder": {"width": 384, "ffn": 2048},
        "decoder": {"refinement": {"curvature": 8.0}},
    },
    "r18": {"backbone": SMALL_VD},
    "r34": {"backbone": SMALL_VD},
}


def _lite(width: int, ffn: int, queries: int) -> dict[str, Any]:
    """One of DEIMv2's smallest.

    Args:
        width: Of the model.
        ffn: Hidden channels of the decoder's feed-forward networks.
        queries: Their number.
    """
    return {
        "width": width,
        "backbone": {**TRAINED, "strides": (16,)},
        "neck": {"levels": 2, "pooled": True},
        "encoder": {"kind": "lite", "expansion": 0.34, "blocks": 2},
        "queries": {"number": queries},
        "decoder": {
            "layers": 3,
            "ffn": ffn,
            "cross_attention": {"points": (4, 2)},
            "refinement": {"shared_boxes": True},
            "gated": False,
        },
    }


DEIMV2_SIZES: dict[str, dict[str, Any]] = {
    "atto": _lite(64, 80, 100),
    "femto": _lite(96, 128, 150),
    "pico": _lite(112, 160, 200),
    "n": {
        **D_FINE_SIZES["n"],
        "encoder": {**D_FINE_SIZES["n"]["encoder"], "smooth": True},
        "decoder": {**D_FINE_SIZES["n"]["decoder"], "ffn": 256},
    },
    "r18": D_FINE_SIZES["r18"],
    "r34": D_FINE_SIZES["r34"],
}
