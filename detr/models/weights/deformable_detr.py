"""Deformable DETR (plain, refined, two-stage) as the transformers library publishes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from detr.config import (
    DecoderConfig,
    DeformableCrossAttentionConfig,
    DeformableEncoderConfig,
    DetachedRefinementConfig,
    DetectorConfig,
    LearnedQueriesConfig,
    NeckConfig,
    NoRefinementConfig,
    TwoStageQueriesConfig,
)
from detr.models.weights.backbones import transformers_backbone
from detr.models.weights.renaming import Rule

BACKBONE = r"model\.backbone\.(?:conv_encoder\.)?model\."
_WB = "(weight|bias)"


def config_of(published: Mapping[str, Any], num_classes: int, place: str) -> DetectorConfig:
    """Our config of a published ``config.json``.

    Args:
        published: Content of ``config.json``.
        num_classes: Classes it predicts.
        place: The source, for messages.
    """
    levels = int(published.get("num_feature_levels", 4))
    dilated = bool(published.get("dilation"))
    strides = (8, 16, 32) if levels > 1 else (16 if dilated else 32,)
    stacks, points = stack_options(published, 1024), published.get("encoder_n_points", 4)
    queries: LearnedQueriesConfig | TwoStageQueriesConfig
    if published.get("two_stage"):
        count = published.get("two_stage_num_proposals", 300)
        queries = TwoStageQueriesConfig(number=count, proposal_tokens="all")
    else:
        queries = LearnedQueriesConfig(number=published.get("num_queries", 300))
    return DetectorConfig(
        num_classes=num_classes,
        width=published.get("d_model", 256),
        attention_heads=published.get("encoder_attention_heads", 8),
        dropout=published.get("dropout", 0.1),
        backbone=transformers_backbone(published, strides, place),
        neck=NeckConfig(levels=levels),
        encoder=DeformableEncoderConfig(points=points, **stacks["encoder"]),
        queries=queries,
        decoder=DecoderConfig(
            cross_attention=DeformableCrossAttentionConfig(points=points),
            refinement=DetachedRefinementConfig()
            if published.get("with_box_refine")
            else NoRefinementConfig(),
            **stacks["decoder"],
        ),
    )


def stack_options(published: Mapping[str, Any], ffn: int) -> dict[str, Any]:
    """Depths and hidden widths, which every detector's ``config.json`` says in the same words.

    Args:
        published: Content of ``config.json``.
        ffn: The library's default.
    """
    return {
        part: {
            "layers": published.get(f"{part}_layers", 6),
            "ffn": published.get("encoder_ffn_dim", ffn),
        }
        for part in ("encoder", "decoder")
    }


def rules(config: DetectorConfig) -> tuple[Rule, ...]:
    """Where the tensors go, the backbone's aside."""
    layer = r"\.layers\.(\d+)\."
    encoder, decoder = r"model\.encoder" + layer, r"model\.decoder" + layer
    table = [
        Rule(rf"model\.input_proj\.(\d+)\.(\d)\.{_WB}", r"neck.projections.\1.\2.\3"),
        Rule(r"model\.level_embed", "encoder.level_embedding"),
        Rule(rf"{encoder}self_attn\.(\w+)\.{_WB}", r"encoder.layers.\1.attention.\2.\3"),
        Rule(rf"{encoder}self_attn_layer_norm\.{_WB}", r"encoder.layers.\1.norm.\2"),
        *feed_forward_rules("encoder"),
        *feed_forward_rules("decoder"),
        *self_attention_rules(decoder, "decoder", "self_"),
        Rule(rf"{decoder}encoder_attn\.(\w+)\.{_WB}", r"decoder.layers.\1.cross_attention.\2.\3"),
        Rule(rf"{decoder}encoder_attn_layer_norm\.{_WB}", r"decoder.layers.\1.cross_norm.\2"),
        Rule(r"model\.query_position_embeddings\.weight", "source.embedding.weight"),
        Rule(rf"model\.reference_points\.{_WB}", r"source.reference_points.\1"),
        Rule(rf"model\.enc_output\.{_WB}", r"source.proposals.project.\1"),
        Rule(rf"model\.enc_output_norm\.{_WB}", r"source.proposals.norm.\1"),
        Rule(rf"model\.pos_trans\.{_WB}", r"source.project.\1"),
        Rule(rf"model\.pos_trans_norm\.{_WB}", r"source.norm.\1"),
    ]
    # The prefixed heads of refined models are the same tensors as those without.
    heads = r"(?:model\.decoder\.)?"
    if config.queries.from_proposals:
        last = config.decoder.layers
        table += [
            Rule(rf"{heads}class_embed\.{last}\.{_WB}", r"source.proposals.class_head.\1"),
            Rule(rf"{heads}bbox_embed\.{last}\.(.+)", r"source.proposals.box_head.\1"),
        ]
    number = r"\1" if config.decoder.refinement.heads_per_layer else "0"
    table += [
        Rule(rf"{heads}class_embed\.(\d+)\.{_WB}", rf"decoder.class_heads.{number}.\2"),
        Rule(rf"{heads}bbox_embed\.(\d+)\.(.+)", rf"decoder.box_heads.{number}.\2"),
    ]
    return tuple(table)


def feed_forward_rules(part: str) -> tuple[Rule, ...]:
    """Feed-forward block of every layer of ``encoder`` or ``decoder``."""
    layer = rf"model\.{part}\.layers\.(\d+)\.(?:mlp\.)?"
    ours = rf"{part}.layers.\1.ffn."
    return (
        Rule(rf"{layer}fc1\.{_WB}", ours + r"expand.\2"),
        Rule(rf"{layer}fc2\.{_WB}", ours + r"contract.\2"),
        Rule(rf"{layer}activation_fn\.weight", ours + "activation.weight"),
        Rule(rf"{layer}final_layer_norm\.{_WB}", ours + r"norm.\2"),
    )


def self_attention_rules(layer: str, part: str, prefix: str) -> tuple[Rule, ...]:
    """Self-attention of every layer; ours keeps query and key projections in one tensor.

    Args:
        layer: Regular expression of the published layer's name.
        part: ``encoder`` or ``decoder``.
        prefix: Of the names in our layer, which tell self- from cross-attention in a decoder.
    """
    ours = rf"{part}.layers.\1.{prefix}"
    return (
        Rule(rf"{layer}self_attn\.q_proj\.{_WB}", ours + r"attention.query_key.\2#0"),
        Rule(rf"{layer}self_attn\.k_proj\.{_WB}", ours + r"attention.query_key.\2#1"),
        Rule(rf"{layer}self_attn\.v_proj\.{_WB}", ours + r"attention.value.\2"),
        Rule(rf"{layer}self_attn\.(?:o|out)_proj\.{_WB}", ours + r"attention.output.\2"),
        Rule(rf"{layer}self_attn_layer_norm\.{_WB}", ours + r"norm.\2"),
    )
