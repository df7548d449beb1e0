"""RF-DETR as the transformers library publishes it: LW-DETR over a windowed DINOv2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from detr.config import DetectorConfig, Dinov2BackboneConfig
from detr.data.preprocess import PreprocessConfig
from detr.errors import UserError
from detr.models.weights import lw_detr
from detr.models.weights.renaming import Rule
from detr.models.weights.rt_detr import check_options

# Canvas of the sizes whose positions are those of DINOv2, which was trained on another.
_DINO_PATCH, _DINO_CANVAS = 14, 560
_WB = "(weight|bias)"
_VIT = "model.backbone.backbone."
_BLOCKS = r"model\.backbone\.backbone\.encoder\.layer\."
_POSITIONS = f"{_VIT}embeddings.position_embeddings"
_CLASS = f"{_VIT}embeddings.cls_token"
# Options of config.json that would make another architecture, and what they are in ours.
_PLAIN: dict[str, Any] = {
    "activation_function": "silu",
    "decoder_activation_function": "relu",
    "attention_bias": True,
    "num_feature_levels": 1,
}
_PLAIN_VIT: dict[str, Any] = {
    "mlp_ratio": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "num_channels": 3,
    "qkv_bias": True,
    "use_swiglu_ffn": False,
    "apply_layernorm": True,
    "reshape_hidden_states": True,
    "num_register_tokens": 0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def config_of(published: Mapping[str, Any], num_classes: int, place: str) -> DetectorConfig:
    """Our config of a published ``config.json``; see :mod:`deformable_detr`.

    Raises:
        UserError: ``weights-config`` for an option we have no architecture for.
    """
    check_options(published, _PLAIN, place)
    # One level in what the library publishes; the original repository's files may tell more.
    return lw_detr.detector_config(published, num_classes).replace(
        backbone=_backbone(published, place),
        neck={
            "kind": "projector",
            "scales": tuple(published.get("projector_scale_factors", (1.0,))),
            "blocks": published.get("c2f_num_blocks", 3),
            "expansion": published.get("hidden_expansion", 0.5),
            "norm": "layer",
            "norm_eps": published.get("layer_norm_eps", 1e-5),
        },
    )


def _backbone(published: Mapping[str, Any], place: str) -> Dinov2BackboneConfig:
    """The DINOv2."""
    inner = published.get("backbone_config") or {}
    kind = inner.get("model_type", "rf_detr_dinov2")
    if kind != "rf_detr_dinov2":
        raise UserError(
            "weights-backbone", f"{place}: the backbone is a {kind}, not a rf_detr_dinov2"
        )
    check_options(inner, _PLAIN_VIT, place)
    patch, size = inner.get("patch_size", 14), inner.get("image_size", 224)
    if not (isinstance(patch, int) and isinstance(size, int)):
        raise UserError("weights-config", f"{place}: image_size {size} of patches {patch}")
    taps = lw_detr.taps_of(inner, place)
    return Dinov2BackboneConfig(
        patch=patch,
        width=inner.get("hidden_size", 768),
        heads=inner.get("num_attention_heads", 12),
        side=size // patch,
        windows=inner.get("num_windows", 4),
        # Blocks are numbered from 0 and taps count blocks, so a map comes before the block that
        # looks everywhere, but for the last one's.
        windowed=tuple(i for i in range(taps[-1]) if i not in taps),
        taps=taps,
        drop_path=inner.get("drop_path_rate", 0.0),
    )


def adapt(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Takes groups apart, adds the class token's position to it, in place."""
    lw_detr.take_groups_apart(tensors)
    if _POSITIONS not in tensors or _CLASS not in tensors:
        return {}
    positions = tensors[_POSITIONS]
    tensors[_CLASS] = (tensors[_CLASS] + positions[:, :1])[0, 0]
    tensors[_POSITIONS] = lw_detr.grid_of(positions)
    return {f"{_POSITIONS}[:, 0]": "added to the class token"}


def preprocess(config: DetectorConfig) -> PreprocessConfig:
    """What a detector's images went through in training.

    Every size was trained on a canvas of its own, which has a cell for each of its positions, but
    for the sizes that keep DINOv2's positions and stretch them.
    """
    backbone = config.backbone
    assert isinstance(backbone, Dinov2BackboneConfig)
    stretched = backbone.patch == _DINO_PATCH
    side = _DINO_CANVAS if stretched else backbone.side * backbone.patch
    return PreprocessConfig(size=(side, side), mean=lw_detr.INPUT.mean, std=lw_detr.INPUT.std)


def license_note(config: DetectorConfig) -> str:
    """What is to be known of a detector's license; empty where it is Apache 2.0.

    Roboflow's sizes XL and 2XL have the DINOv2 of width 768 and a decoder of width 512.
    """
    backbone = config.backbone
    large = isinstance(backbone, Dinov2BackboneConfig) and backbone.width == 768
    if not large or config.width != 512:
        return ""
    return (
        "license: weights of RF-DETR's sizes XL and 2XL are under Roboflow's Platform Model "
        "License 1.0 and not under Apache 2.0; using them needs an agreement with Roboflow"
    )


def rules(config: DetectorConfig) -> tuple[Rule, ...]:
    """Where the tensors go, the backbone's too."""
    block, ours = rf"{_BLOCKS}(\d+)\.", r"backbone.blocks.\1."
    vit = _VIT.replace(".", r"\.")
    neck = r"model\.backbone\.projector\."
    return (
        *lw_detr.unused_block_rules(block, config),
        *lw_detr.detector_rules(config),
        *lw_detr.neck_rules(),
        *lw_detr.c2f_rules(neck, "neck.levels.0"),
        Rule(rf"{vit}embeddings\.mask_token", None, "of the backbone's pretraining"),
        Rule(rf"{vit}embeddings\.patch_embeddings\.projection\.{_WB}", r"backbone.embed.\1"),
        Rule(_POSITIONS.replace(".", r"\."), "backbone.positions"),
        Rule(_CLASS.replace(".", r"\."), "backbone.class_token"),
        Rule(rf"{vit}layernorm\.{_WB}", r"backbone.final_norm.\1"),
        *lw_detr.attention_rules(block, ours),
        Rule(rf"{block}norm1\.{_WB}", ours + r"norm.\2"),
        Rule(rf"{block}norm2\.{_WB}", ours + r"ffn_norm.\2"),
        Rule(rf"{block}mlp\.fc1\.{_WB}", ours + r"expand.\2"),
        Rule(rf"{block}mlp\.fc2\.{_WB}", ours + r"contract.\2"),
        Rule(rf"{block}layer_scale1\.lambda1", ours + "scale"),
        Rule(rf"{block}layer_scale2\.lambda1", ours + "ffn_scale"),
    )
