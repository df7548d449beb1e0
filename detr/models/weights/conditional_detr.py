"""Conditional DETR as the transformers library publishes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from detr.config import DetectorConfig
from detr.models.weights.deformable_detr import feed_forward_rules
from detr.models.weights.detr import DECODER, dense_encoder_rules, dense_options
from detr.models.weights.renaming import Rule
from detr.presets import FAMILIES

_WB = "(weight|bias)"


def config_of(published: Mapping[str, Any], num_classes: int, place: str) -> DetectorConfig:
    """Our config of a published ``config.json``; see :mod:`deformable_detr`."""
    return FAMILIES["conditional-detr"].replace(
        num_classes=num_classes,
        queries={"number": published.get("num_queries", 300)},
        **dense_options(published, place),
    )


def rules(config: DetectorConfig) -> tuple[Rule, ...]:
    """Where the tensors go, the backbone's aside."""
    # Older files have the projections beside the attention and not in it.
    own = rf"{DECODER}(?:self_attn\.|sa_)"
    cross = rf"{DECODER}(?:encoder_attn\.|ca_)"
    return (
        *dense_encoder_rules(),
        *feed_forward_rules("decoder"),
        *conditional_rules(
            own_content=own + r"{}_?content_proj\.",
            own_position=own + r"{}_?pos_proj\.",
            own_value=own + r"v_proj\.",
            own_output=rf"{DECODER}self_attn\.(?:o|out)_proj\.",
            cross_content=cross + r"{}_?content_proj\.",
            cross_position=cross + r"{}_?pos_proj\.",
            cross_value=cross + r"v_proj\.",
            cross_sine=cross + r"q_?pos_sine_proj\.",
            cross_output=rf"{DECODER}encoder_attn\.(?:o|out)_proj\.",
        ),
        Rule(rf"{DECODER}self_attn_layer_norm\.{_WB}", r"decoder.layers.\1.self_norm.\2"),
        Rule(rf"{DECODER}encoder_attn_layer_norm\.{_WB}", r"decoder.layers.\1.cross_norm.\2"),
        Rule(rf"model\.decoder\.layernorm\.{_WB}", r"decoder.norm.\1"),
        Rule(r"model\.decoder\.query_scale\.(.+)", r"decoder.spatial.scale.\1"),
        Rule(r"model\.decoder\.ref_point_head\.(.+)", r"source.reference_points.\1"),
        Rule(r"model\.query_position_embeddings\.weight", "source.embedding.weight"),
        Rule(rf"class_labels_classifier\.{_WB}", r"decoder.class_heads.0.\1"),
        Rule(r"bbox_predictor\.(.+)", r"decoder.box_heads.0.\1"),
    )


def conditional_rules(
    *,
    own_content: str,
    own_position: str,
    own_value: str,
    own_output: str,
    cross_content: str,
    cross_position: str,
    cross_value: str,
    cross_sine: str,
    cross_output: str,
) -> tuple[Rule, ...]:
    """Conditional attention of every decoder layer.

    The arguments are regular expressions of what precedes ``weight`` or ``bias``; group 1 is the
    layer's number, and ``{}`` stands for the letter that tells queries from keys.
    """
    ours = r"decoder.layers.\1."
    query, key = "q", "k"
    pairs = {
        own_content.format(query): r"self_attention.query_key.\2#0",
        own_content.format(key): r"self_attention.query_key.\2#1",
        own_position.format(query): r"self_attention.position.\2#0",
        own_position.format(key): r"self_attention.position.\2#1",
        own_value: r"self_attention.value.\2",
        own_output: r"self_attention.output.\2",
        cross_content.format(query): r"cross_attention.query.\2",
        cross_content.format(key): r"cross_attention.key.\2",
        cross_position.format(query): r"cross_attention.position.\2",
        cross_position.format(key): r"cross_attention.spatial_key.\2",
        cross_value: r"cross_attention.value.\2",
        cross_sine: r"cross_attention.spatial_query.\2",
        cross_output: r"cross_attention.output.\2",
    }
    return tuple(Rule(source + _WB, ours + target) for source, target in pairs.items())
