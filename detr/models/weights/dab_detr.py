"""DAB-DETR as the transformers library publishes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from detr.config import DetectorConfig, merged
from detr.errors import UserError
from detr.models.weights.conditional_detr import conditional_rules
from detr.models.weights.deformable_detr import feed_forward_rules
from detr.models.weights.detr import DECODER, dense_encoder_rules, dense_options
from detr.models.weights.renaming import Rule
from detr.presets import FAMILIES

# The library nests the backbone once more than in its other detectors.
BACKBONE = r"model\.backbone\.(?:conv_encoder\.)?model\.(?:_backbone\.)?"
_WB = "(weight|bias)"


def config_of(published: Mapping[str, Any], num_classes: int, place: str) -> DetectorConfig:
    """Our config of a published ``config.json``; see :mod:`deformable_detr`.

    Raises:
        UserError: ``weights-config`` for a variant that no published model uses.
    """
    height, width = published.get("temperature_height", 20), published.get("temperature_width", 20)
    for option, wanted in (("keep_query_pos", False), ("normalize_before", False)):
        if published.get(option, wanted) != wanted:
            raise UserError("weights-config", f"{place}: {option} is not supported")
    if height != width:
        raise UserError("weights-config", f"{place}: temperatures {height} and {width} differ")
    activation = {"activation": published.get("activation_function", "prelu")}
    changes = {
        "num_classes": num_classes,
        "positions": {"temperature": height},
        "encoder": activation,
        "queries": {
            "number": published.get("num_queries", 300),
            "patterns": published.get("num_patterns", 0),
            "random_centers": published.get("random_refpoints_xy", False),
        },
        "decoder": activation,
        "heads": {"boxes": {"logit_eps": 1e-5}},
    }
    return FAMILIES["dab-detr"].replace(**merged(dense_options(published, place), changes))


def rules(config: DetectorConfig) -> tuple[Rule, ...]:
    """Where the tensors go, the backbone's aside."""
    own, cross = rf"{DECODER}self_attn\.self_attn_", rf"{DECODER}cross_attn\.cross_attn_"
    return (
        *dense_encoder_rules(),
        *feed_forward_rules("decoder"),
        *conditional_rules(
            own_content=own + r"{}(?:uery|ey)_content_proj\.",
            own_position=own + r"{}(?:uery|ey)_pos_proj\.",
            own_value=own + r"value_proj\.",
            own_output=rf"{DECODER}self_attn\.self_attn\.output_proj\.",
            cross_content=cross + r"{}(?:uery|ey)_content_proj\.",
            cross_position=cross + r"{}(?:uery|ey)_pos_proj\.",
            cross_value=cross + r"value_proj\.",
            cross_sine=cross + r"query_pos_sine_proj\.",
            cross_output=rf"{DECODER}cross_attn\.cross_attn\.output_proj\.",
        ),
        Rule(
            rf"{DECODER}self_attn\.self_attn_layer_norm\.{_WB}", r"decoder.layers.\1.self_norm.\2"
        ),
        Rule(
            rf"{DECODER}cross_attn\.cross_attn_layer_norm\.{_WB}",
            r"decoder.layers.\1.cross_norm.\2",
        ),
        Rule(rf"model\.decoder\.layernorm\.{_WB}", r"decoder.norm.\1"),
        Rule(r"model\.encoder\.query_scale\.(.+)", r"encoder.position_scale.\1"),
        Rule(r"model\.decoder\.query_scale\.(.+)", r"decoder.spatial.scale.\1"),
        Rule(r"model\.decoder\.ref_anchor_head\.(.+)", r"decoder.spatial.size.\1"),
        Rule(r"model\.decoder\.ref_point_head\.(.+)", r"source.reference_mlp.\1"),
        Rule(r"model\.query_refpoint_embeddings\.weight", "source.anchors.weight"),
        Rule(r"model\.patterns\.weight", "source.content.weight"),
        Rule(rf"class_embed\.{_WB}", r"decoder.class_heads.0.\1"),
        Rule(r"(?:bbox_predictor|model\.decoder\.bbox_embed)\.(.+)", r"decoder.box_heads.0.\1"),
    )
