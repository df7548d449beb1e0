"""Checkpoints of the RT-DETR repository, versions 1 and 2, and of DEIM's RT-DETRv2.

The architecture is read off names and shapes. Names are put in the transformers library's terms,
whose table then says where they go.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from detr.errors import UserError
from detr.models.weights import hugging_face, rt_detr
from detr.models.weights.imported import Imported
from detr.models.weights.renaming import split_projections

# A tensor that only this repository's checkpoints have.
MARK = "decoder.dec_score_head.0.weight"
_HEADS = 8  # in every published config; nothing in the tensors tells
_LAYER = (
    (r"self_attn\.out_proj\.", "self_attn.o_proj."),
    (r"cross_attn\.", "encoder_attn."),
    (r"linear1\.", "mlp.fc1."),
    (r"linear2\.", "mlp.fc2."),
)
# A block's tensor; the convolution of an averaging shortcut is called conv.conv.
_BLOCK = (
    r"backbone\.res_layers\.(\d)\.blocks\.(\d+)\.(branch2[abc]|short)\."
    r"(?:conv\.(?=conv|norm))?(conv|norm)\.(.+)"
)
# Norms of a layer, whose numbers mean other things in encoder and decoder.
_ENCODER_NORMS = ((r"norm1\.", "self_attn_layer_norm."), (r"norm2\.", "final_layer_norm."))
_DECODER_NORMS = (
    (r"norm1\.", "self_attn_layer_norm."),
    (r"norm2\.", "encoder_attn_layer_norm."),
    (r"norm3\.", "final_layer_norm."),
)
_NAMES = (
    (r"encoder\.input_proj\.(\d)\.conv\.", r"model.encoder_input_proj.\1.0."),
    (r"encoder\.input_proj\.(\d)\.norm\.", r"model.encoder_input_proj.\1.1."),
    (r"encoder\.input_proj\.", "model.encoder_input_proj."),
    (r"encoder\.encoder\.", "model.encoder.aifi."),
    (r"encoder\.", "model.encoder."),
    (r"decoder\.input_proj\.(\d)\.conv\.", r"model.decoder_input_proj.\1.0."),
    (r"decoder\.input_proj\.(\d)\.norm\.", r"model.decoder_input_proj.\1.1."),
    (r"decoder\.decoder\.layers\.", "model.decoder.layers."),
    (r"decoder\.enc_output\.proj\.", "model.enc_output.0."),
    (r"decoder\.enc_output\.norm\.", "model.enc_output.1."),
    (r"decoder\.(enc_output|enc_score_head|enc_bbox_head|denoising_class_embed)\.", r"model.\1."),
    (r"decoder\.(anchors|valid_mask)", r"model.\1"),
    (r"decoder\.query_pos_head\.", "model.decoder.query_pos_head."),
    (r"decoder\.dec_score_head\.", "model.decoder.class_embed."),
    (r"decoder\.dec_bbox_head\.", "model.decoder.bbox_embed."),
)


def convert(
    tensors: Mapping[str, Tensor], place: str, discrete: bool = False, deim: bool = False
) -> Imported:
    """Our detector of a checkpoint's state dict.

    Args:
        tensors: The state dict; the average's, where there is one.
        place: The source, for messages.
        discrete: It samples whole cells (version 2); nothing in the tensors tells.
        deim: It is DEIM's, with SiLU in the decoder; nothing in the tensors tells.

    Raises:
        UserError: ``weights-backbone`` for another backbone than a ResNet-vd, ``weights-config``
            for a variant we have no architecture for, and what
            :func:`detr.models.weights.hugging_face.convert` raises.
    """
    if "backbone.conv1.conv1_1.conv.weight" not in tensors:
        raise UserError("weights-backbone", f"{place}: the backbone is no ResNet-vd")
    named = {_translated(name): x for name, x in split_projections(tensors).items()}
    published = _published(tensors, place)
    published["decoder_method"] = "discrete" if discrete else "default"
    published[rt_detr.ACTIVATION] = "silu" if deim else "relu"
    return hugging_face.convert(published, named, place)


def _published(tensors: Mapping[str, Tensor], place: str) -> dict[str, Any]:
    """What the transformers library's ``config.json`` would say."""
    stage = "backbone.res_layers.{}.blocks"
    bottleneck = "backbone.res_layers.0.blocks.0.branch2c.conv.weight" in tensors
    last = "branch2c" if bottleneck else "branch2b"
    widths = [len(tensors[f"{stage.format(i)}.0.{last}.conv.weight"]) for i in range(4)]
    inner = len(tensors["encoder.lateral_convs.0.conv.weight"])
    fused = len(tensors["encoder.fpn_blocks.0.conv1.conv.weight"])
    layer = "decoder.decoder.layers.0"
    levels = depth(tensors, "encoder.fpn_blocks") + 1
    offsets = len(tensors[f"{layer}.cross_attn.sampling_offsets.bias"])
    scales = tensors.get(f"{layer}.cross_attn.num_points_scale")
    if scales is not None and len(set(scales.tolist())) > 1:
        raise UserError("weights-config", f"{place}: levels with unequal points are not supported")
    blocks = depth(tensors, "encoder.fpn_blocks.0.bottlenecks")
    if blocks != 3:
        raise UserError("weights-config", f"{place}: {blocks} RepVGG blocks are not supported")
    classes = len(tensors[MARK])
    trained = "backbone.conv1.conv1_1.norm.num_batches_tracked" in tensors
    ffn = "encoder.encoder.0.layers.0.linear1.weight"
    return {
        "model_type": "rt_detr",
        "id2label": {str(i): f"class-{i}" for i in range(classes)},
        "backbone_config": {
            "layer_type": "bottleneck" if bottleneck else "basic",
            "hidden_sizes": widths,
            "depths": [depth(tensors, stage.format(i)) for i in range(4)],
            "embedding_size": len(tensors["backbone.conv1.conv1_3.conv.weight"]),
        },
        "freeze_backbone_batch_norms": not trained,
        "encoder_hidden_dim": inner,
        "encoder_ffn_dim": len(tensors[ffn]) if ffn in tensors else 1024,
        "encoder_layers": depth(tensors, "encoder.encoder.0.layers"),
        "hidden_expansion": fused / inner,
        "d_model": len(tensors[f"{layer}.norm1.weight"]),
        "encoder_attention_heads": _HEADS,
        "decoder_attention_heads": _HEADS,
        "decoder_ffn_dim": len(tensors[f"{layer}.linear1.weight"]),
        "decoder_layers": depth(tensors, "decoder.dec_score_head"),
        "decoder_n_points": offsets // (2 * _HEADS * levels),
        "num_feature_levels": levels,
        "position_layers": depth(tensors, "decoder.query_pos_head.layers"),
    }


def _translated(name: str) -> str:
    """A name in the transformers library's terms."""
    if found := re.match(r"backbone\.conv1\.conv1_(\d)\.(conv|norm)\.(.+)", name):
        index, part, rest = int(found[1]) - 1, _part(found[2]), found[3]
        return f"model.backbone.model.embedder.embedder.{index}.{part}.{rest}"
    if found := re.match(_BLOCK, name):
        place = f"model.backbone.model.encoder.stages.{found[1]}.layers.{found[2]}"
        own = "shortcut" if found[3] == "short" else f"layer.{'abc'.index(found[3][-1])}"
        return f"{place}.{own}.{_part(found[4])}.{found[5]}"
    for pattern, replacement in _NAMES:
        changed, count = re.subn(f"^{pattern}", replacement, name)
        if count:
            norms = _DECODER_NORMS if changed.startswith("model.decoder.") else _ENCODER_NORMS
            return in_layer(changed, (*_LAYER, *norms))
    return name


def _part(name: str) -> str:
    return {"conv": "convolution", "norm": "normalization"}[name]


def in_layer(name: str, table: Sequence[tuple[str, str]]) -> str:
    """A layer's tensor by its name in the transformers library's layers.

    Args:
        name: What is before the layer's number is in its terms.
        table: Substitutions at the start of what follows, all that fit in turn.
    """
    found = re.match(r"(model\.(?:encoder\.aifi\.0|decoder)\.layers\.\d+\.)(.+)", name)
    if found is None:
        return name
    rest = found[2]
    for pattern, replacement in table:
        rest = re.sub(f"^{pattern}", replacement, rest)
    return found[1] + rest


def depth(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """How many modules are numbered after a prefix: one more than the largest number."""
    found = (re.match(rf"{re.escape(prefix)}\.(\d+)\.", name) for name in tensors)
    return max((int(m[1]) for m in found if m), default=-1) + 1
