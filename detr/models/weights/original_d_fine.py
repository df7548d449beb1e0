"""Checkpoints of the D-FINE repository, and of DEIM's D-FINE.

As :mod:`original_rt_detr`: the architecture is read off names and shapes, and names are put in the
transformers library's terms, whose table then says where they go.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from detr.errors import UserError
from detr.models.weights import hugging_face, rt_detr
from detr.models.weights.imported import Imported
from detr.models.weights.original_rt_detr import depth, in_layer
from detr.models.weights.renaming import split_projections

# A tensor that only this repository's checkpoints have.
MARK = "decoder.decoder.layers.0.gateway.gate.weight"
_FIRST = "decoder.decoder.layers.0"
_STEM = "backbone.stem.stem1.conv.weight"
_HEADS = 8  # in every published config; nothing in the tensors tells
_LAYER = (
    (r"self_attn\.out_proj\.", "self_attn.o_proj."),
    (r"cross_attn\.", "encoder_attn."),
    (r"linear1\.", "mlp.layers.0."),
    (r"linear2\.", "mlp.layers.1."),
    (r"norm1\.", "self_attn_layer_norm."),
    (r"norm[23]\.", "final_layer_norm."),
)
_GELAN = {
    "cv1": "conv1",
    "cv2.0": "csp_rep1",
    "cv2.1": "conv2",
    "cv3.0": "csp_rep2",
    "cv3.1": "conv3",
    "cv4": "conv4",
}
_PARTS = {"conv": "convolution", "bn": "normalization", "lab": "lab"}
_NAMES = (
    (r"encoder\.input_proj\.(\d)\.conv\.", r"model.encoder_input_proj.\1.0."),
    (r"encoder\.input_proj\.(\d)\.norm\.", r"model.encoder_input_proj.\1.1."),
    (r"encoder\.encoder\.", "model.encoder.aifi."),
    (r"encoder\.downsample_convs\.(\d)\.0\.cv", r"model.encoder.downsample_convs.\1.conv"),
    (r"encoder\.", "model.encoder."),
    (r"decoder\.input_proj\.(\d)\.conv\.", r"model.decoder_input_proj.\1.0."),
    (r"decoder\.input_proj\.(\d)\.norm\.", r"model.decoder_input_proj.\1.1."),
    (r"decoder\.decoder\.(layers|lqe_layers)\.", r"model.decoder.\1."),
    (r"decoder\.enc_output\.proj\.", "model.enc_output.0."),
    (r"decoder\.enc_output\.norm\.", "model.enc_output.1."),
    (r"decoder\.(enc_score_head|enc_bbox_head|denoising_class_embed)\.", r"model.\1."),
    (r"decoder\.(anchors|valid_mask)", r"model.\1"),
    (r"decoder\.dec_score_head\.", "model.decoder.class_embed."),
    (r"decoder\.dec_bbox_head\.", "model.decoder.bbox_embed."),
    (r"decoder\.", "model.decoder."),
)


def convert(
    tensors: Mapping[str, Tensor], place: str, discrete: bool = False, deim: bool = False
) -> Imported:
    """Our detector of a checkpoint's state dict.

    Args:
        tensors: The state dict; the average's, where there is one.
        place: The source, for messages.
        discrete: It samples whole cells; nothing in the tensors tells.
        deim: It is DEIM's, with SiLU in the decoder; nothing in the tensors tells.

    Raises:
        UserError: ``weights-backbone`` for another backbone than an HGNetv2, ``weights-config``
            for a variant we have no architecture for, and what
            :func:`detr.models.weights.hugging_face.convert` raises.
    """
    if _STEM not in tensors:
        raise UserError("weights-backbone", f"{place}: the backbone is no HGNetv2")
    if any(name.startswith("decoder.tgt_embed.") for name in tensors):
        raise UserError("weights-config", f"{place}: learn_query_content is not supported")
    named = {translated(name): x for name, x in split_projections(tensors).items()}
    told = {
        **published(tensors, "encoder.fpn_blocks.0"),
        "model_type": "d_fine",
        "decoder_ffn_dim": len(tensors[f"{_FIRST}.linear1.weight"]),
        "decoder_method": "discrete" if discrete else "default",
        rt_detr.ACTIVATION: "silu" if deim else "relu",
    }
    return hugging_face.convert(told, named, place)


def published(tensors: Mapping[str, Tensor], block: str) -> dict[str, Any]:
    """What the transformers library's ``config.json`` would say, the decoder's layers aside.

    Args:
        tensors: The state dict.
        block: The first block that fuses two maps.
    """
    inner = len(tensors[f"{block}.cv4.conv.weight"])
    ways = len(tensors[f"{block}.cv2.0.bottlenecks.0.conv1.conv.weight"])
    quality = tensors["decoder.decoder.lqe_layers.0.reg_conf.layers.0.weight"]
    points = _points(tensors[f"{_FIRST}.cross_attn.num_points_scale"].tolist())
    levels = len(points)
    strides = [8, 16, 32, 64][:levels] if levels > 2 else [16, 32][-levels:]
    ffn = "encoder.encoder.0.layers.0.linear1.weight"
    return {
        "id2label": {
            str(i): f"class-{i}" for i in range(len(tensors["decoder.dec_score_head.0.weight"]))
        },
        "backbone_config": _backbone(tensors) if _STEM in tensors else {},
        "freeze_backbone_batch_norms": "backbone.stem.stem1.bn.num_batches_tracked" not in tensors,
        "feat_strides": strides,
        "num_feature_levels": levels,
        "encode_proj_layers": [levels - 1],
        "encoder_hidden_dim": inner,
        "encoder_ffn_dim": len(tensors[ffn]) if ffn in tensors else 1024,
        "encoder_layers": depth(tensors, "encoder.encoder.0.layers"),
        "hidden_expansion": 2 * ways / inner,
        "depth_mult": depth(tensors, f"{block}.cv2.0.bottlenecks") / 3,
        "d_model": len(tensors[f"{_FIRST}.self_attn.out_proj.bias"]),
        "encoder_attention_heads": _HEADS,
        "decoder_attention_heads": _HEADS,
        "decoder_layers": depth(tensors, "decoder.dec_score_head"),
        "decoder_n_points": points,
        "max_num_bins": len(tensors["decoder.dec_bbox_head.0.layers.2.bias"]) // 4 - 1,
        "up": float(tensors["decoder.up"]),
        "reg_scale": float(tensors["decoder.reg_scale"]),
        "top_prob_values": quality.shape[1] // 4 - 1,
        "lqe_hidden_dim": quality.shape[0],
        "lqe_layers": depth(tensors, "decoder.decoder.lqe_layers.0.reg_conf.layers"),
    }


def _backbone(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the config would say of the HGNetv2."""
    stages = [f"backbone.stages.{i}.blocks" for i in range(depth(tensors, "backbone.stages"))]
    # A light block's convolution is made of two.
    plain, light = ".0.layers.0.conv.weight", ".0.layers.0.conv1.conv.weight"
    first = [tensors[s + (plain if s + plain in tensors else light)] for s in stages]
    return {
        "model_type": "hgnet_v2",
        "stage_mid_channels": [len(x) for x in first],
        "stage_out_channels": [len(tensors[_aggregated(tensors, s)]) for s in stages],
        "stage_num_blocks": [depth(tensors, s) for s in stages],
        "stage_numb_of_layers": [depth(tensors, f"{s}.0.layers") for s in stages],
        "use_learnable_affine_block": "backbone.stem.stem1.lab.scale" in tensors,
    }


def _aggregated(tensors: Mapping[str, Tensor], stage: str) -> str:
    """Weight of the last convolution of a stage's first block."""
    return f"{stage}.0.aggregation.{depth(tensors, f'{stage}.0.aggregation') - 1}.conv.weight"


def _points(shares: list[float]) -> list[int]:
    """Points of each level, of which every sample has a share."""
    counts: list[int] = []
    while sum(counts) < len(shares):
        counts.append(round(1 / shares[sum(counts)]))
    return counts


def translated(name: str, layer: Sequence[tuple[str, str]] = _LAYER) -> str:
    """A name in the transformers library's terms.

    Args:
        name: Of the repository.
        layer: Substitutions within a transformer layer.
    """
    found = re.fullmatch(r"backbone\.(stem|stages)\.(.+)\.(conv|bn|lab)\.(\w+)", name)
    if found is not None:
        place = {"stem": "embedder", "stages": "encoder.stages"}[found[1]]
        return f"model.backbone.model.{place}.{found[2]}.{_PARTS[found[3]]}.{found[4]}"
    if found := re.match(r"encoder\.(fpn|pan)_blocks\.(\d)\.(cv[14]|cv[23]\.\d)\.(.+)", name):
        return f"model.encoder.{found[1]}_blocks.{found[2]}.{_GELAN[found[3]]}.{found[4]}"
    for pattern, replacement in _NAMES:
        changed, count = re.subn(f"^{pattern}", replacement, name)
        if count:
            return in_layer(changed, layer)
    return name
