"""DETR as the transformers library publishes it, and what other dense detectors share with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from detr.config import DetectorConfig
from detr.models.weights.backbones import transformers_backbone
from detr.models.weights.deformable_detr import (
    feed_forward_rules,
    self_attention_rules,
    stack_options,
)
from detr.models.weights.renaming import Rule
from detr.presets import FAMILIES

BACKBONE = r"model\.backbone\.(?:conv_encoder\.)?model\."
_WB = "(weight|bias)"
ENCODER = r"model\.encoder\.layers\.(\d+)\."
DECODER = r"model\.decoder\.layers\.(\d+)\."


def dense_options(published: Mapping[str, Any], place: str) -> dict[str, Any]:
    """What every dense detector's ``config.json`` says in the same words."""
    backbone = published.get("backbone_config") or {}
    dilated = bool(published.get("dilation")) or backbone.get("output_stride") == 16
    return {
        "backbone": transformers_backbone(published, (16 if dilated else 32,), place),
        "width": published.get("d_model", published.get("hidden_size", 256)),
        "attention_heads": published.get("encoder_attention_heads", 8),
        "dropout": published.get("dropout", 0.1),
        **stack_options(published, 2048),
    }


def config_of(published: Mapping[str, Any], num_classes: int, place: str) -> DetectorConfig:
    """Our config of a published ``config.json``; see :mod:`deformable_detr`."""
    return FAMILIES["detr"].replace(
        num_classes=num_classes,
        queries={"number": published.get("num_queries", 100)},
        **dense_options(published, place),
    )


def rules(config: DetectorConfig) -> tuple[Rule, ...]:
    """Where the tensors go, the backbone's aside."""
    cross = r"decoder.layers.\1.cross_"
    return (
        *dense_encoder_rules(),
        *feed_forward_rules("decoder"),
        *self_attention_rules(DECODER, "decoder", "self_"),
        Rule(rf"{DECODER}encoder_attn\.q_proj\.{_WB}", cross + r"attention.query.\2"),
        Rule(rf"{DECODER}encoder_attn\.k_proj\.{_WB}", cross + r"attention.key.\2"),
        Rule(rf"{DECODER}encoder_attn\.v_proj\.{_WB}", cross + r"attention.value.\2"),
        Rule(rf"{DECODER}encoder_attn\.(?:o|out)_proj\.{_WB}", cross + r"attention.output.\2"),
        Rule(rf"{DECODER}encoder_attn_layer_norm\.{_WB}", cross + r"norm.\2"),
        Rule(rf"model\.decoder\.layernorm\.{_WB}", r"decoder.norm.\1"),
        Rule(r"model\.query_position_embeddings\.weight", "source.embedding.weight"),
        Rule(rf"class_labels_classifier\.{_WB}", r"decoder.class_heads.0.\1"),
        Rule(r"bbox_predictor\.(.+)", r"decoder.box_heads.0.\1"),
    )


def dense_encoder_rules() -> tuple[Rule, ...]:
    """Input projection and encoder layers, alike in every dense detector."""
    return (
        Rule(rf"model\.input_projection\.{_WB}", r"neck.projections.0.0.\1"),
        *feed_forward_rules("encoder"),
        *self_attention_rules(ENCODER, "encoder", ""),
    )
