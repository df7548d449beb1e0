"""The field's detectors by name: ``FAMILY-BACKBONE``, such as ``dino-r50`` or ``detr-dc5-r18``.

Constants are those of the original repositories; where code bases differ, the family says whose.
"""

from __future__ import annotations

import difflib
from typing import Any

from detr.config import BackboneConfig, DenoisingConfig, DetectorConfig, OneToManyConfig
from detr.errors import UserError

# Short name to timm model and the tag of its ImageNet weights.
BACKBONES = {
    "r18": ("resnet18", "hub:resnet18.tv_in1k"),
    "r34": ("resnet34", "hub:resnet34.tv_in1k"),
    "r50": ("resnet50", "hub:resnet50.tv_in1k"),
    "r101": ("resnet101", "hub:resnet101.tv_in1k"),
    "swin-t": (
        "swin_tiny_patch4_window7_224",
        "hub:swin_tiny_patch4_window7_224.ms_in1k",
    ),
    "swin-s": (
        "swin_small_patch4_window7_224",
        "hub:swin_small_patch4_window7_224.ms_in1k",
    ),
    "swin-b": (
        "swin_base_patch4_window12_384",
        "hub:swin_base_patch4_window12_384.ms_in22k",
    ),
    "swin-l": (
        "swin_large_patch4_window12_384",
        "hub:swin_large_patch4_window12_384.ms_in22k",
    ),
}

_DENSE: dict[str, Any] = {"levels": 1, "ffn": 2048, "pe_offset": 0.0}
_DETR = {**_DENSE, "attention": "dense", "queries": 100, "dropout": 0.1} | {
    "classification": "softmax"
}
_CONDITIONAL = {**_DENSE, "attention": "conditional", "dropout": 0.1}
_ANCHORS = {"query": "anchors", "refine": "look_forward_twice", "shared_heads": True}
_DAB = {**_DENSE, **_ANCHORS, "attention": "conditional", "activation": "prelu"} | {
    "pe_temperature": 20.0,
    "logit_eps": 1e-3,
    "detections": 300,
}
_DEFORMABLE: dict[str, Any] = {"dropout": 0.1}
_REFINED = {**_DEFORMABLE, "refine": "detach"}
_DAB_DEFORMABLE = {"query": "anchors", "refine": "detach", "ffn": 2048, "detections": 300} | {
    "logit_eps": 1e-3,
}
_DN = DenoisingConfig(contrastive=False, number=5, label_noise=0.2, box_noise=0.4)
_DINO = {"query": "mixed", "refine": "look_forward_twice", "ffn": 2048, "queries": 900} | {
    "denoising": DenoisingConfig(),
    "proposal_tokens": "all",
    "logit_eps": 1e-3,
    "detections": 300,
}
_OFFICIAL = {"pe_temperature": 20.0, "pe_offset": 0.0}

# Family to what it changes of a DetectorConfig.
FAMILIES: dict[str, dict[str, Any]] = {
    "detr": _DETR,
    "detr-dc5": _DETR,
    "conditional-detr": _CONDITIONAL,
    "conditional-detr-dc5": _CONDITIONAL,
    "dab-detr": _DAB,
    "dab-detr-dc5": _DAB,
    "dab-detr-patterns": {**_DAB, "patterns": 3},
    "dn-dab-detr": {**_DAB, "denoising": _DN},
    "deformable-detr": _DEFORMABLE,
    "deformable-detr-refine": _REFINED,
    "deformable-detr-two-stage": {**_REFINED, "query": "two_stage", "proposal_tokens": "all"},
    "deformable-detr-shared": {**_REFINED, "shared_heads": True, "shared_decoder": True},
    "dab-deformable-detr": _DAB_DEFORMABLE,
    "dn-deformable-detr": {**_DAB_DEFORMABLE, "denoising": _DN},
    "h-deformable-detr": {
        "query": "two_stage",
        "learned_content": True,
        "refine": "look_forward_twice",
        "ffn": 2048,
        "proposal_tokens": "all",
        "one_to_many": OneToManyConfig(),
    },
    # detrex and Stable-DINO: heads per layer, Deformable DETR's image positions.
    "dino": _DINO,
    "dino-5scale": {**_DINO, "levels": 5},
    # IDEA-Research/DINO: shared heads. mmdet: its positions, but heads per layer.
    "dino-official": {**_DINO, **_OFFICIAL, "shared_heads": True},
    "dino-mmdet": {**_DINO, **_OFFICIAL},
    "stable-dino": {**_DINO, "memory_fusion": "dense"},
}


def preset_names() -> list[str]:
    """Every name :func:`preset` knows."""
    return sorted(
        f"{family}-{backbone}"
        for family in FAMILIES
        for backbone in BACKBONES
        if not ("dc5" in family and backbone.startswith("swin"))
    )


def preset(name: str, num_classes: int, pretrained: bool = True) -> DetectorConfig:
    """The config of a published detector.

    Args:
        name: ``FAMILY-BACKBONE``.
        num_classes: K.
        pretrained: Name the backbone's ImageNet weights and freeze its batch norms; otherwise it
            starts from random weights and trains them.

    Raises:
        UserError: ``preset-unknown`` with the nearest names.
    """
    if name not in preset_names():
        near = difflib.get_close_matches(name, preset_names(), 3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise UserError("preset-unknown", f"no detector is called {name!r}{hint}")
    # Backbones' names have dashes, too, but none ends with another.
    short = next(b for b in BACKBONES if name.endswith(f"-{b}"))
    family = name.removesuffix(f"-{short}")
    changes = FAMILIES[family]
    dilated = family.endswith("-dc5")
    timm_name, weights = BACKBONES[short]
    options: dict[str, Any] = {"output_stride": 16} if dilated else {}
    strides: tuple[int, ...] = (8, 16, 32)
    if changes.get("levels") == 1:
        strides = (16,) if dilated else (32,)
    elif changes.get("levels") == 5:
        strides = (4, 8, 16, 32)
    backbone = BackboneConfig(
        name=timm_name,
        strides=strides,
        norm="frozen" if pretrained else "train",
        pretrained=weights if pretrained else None,
        options=options,
        map_norm=short.startswith("swin"),
    )
    return DetectorConfig(num_classes=num_classes, backbone=backbone, **changes)
