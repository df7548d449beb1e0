"""Checkpoints of the DEIMv2 repository.

As :mod:`original_d_fine`, many of whose names it has: the architecture is read off names and
shapes, and names are put in the transformers library's terms, whose table then says where they go.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from detr.errors import UserError
from detr.models.weights import dinov3, hugging_face, original_d_fine
from detr.models.weights.imported import Imported
from detr.models.weights.original_rt_detr import depth
from detr.models.weights.renaming import split_projections

# A tensor that only this repository's checkpoints have.
MARK = "decoder.decoder.layers.0.swish_ffn.w12.weight"
_LITE = "encoder.down_sample1.1.weight"
_LAYER = (
    (r"self_attn\.out_proj\.", "self_attn.o_proj."),
    (r"cross_attn\.", "encoder_attn."),
    (r"swish_ffn\.w3\.", "mlp.down_proj."),
    (r"linear1\.", "mlp.layers.0."),
    (r"linear2\.", "mlp.layers.1."),
)
# Norms of a layer, whose numbers mean other things in encoder and decoder.
_NORMS = {
    "encoder": ((r"norm1\.", "self_attn_layer_norm."), (r"norm2\.", "final_layer_norm.")),
    "decoder": (
        (r"norm1\.scale", "self_attn_layer_norm.weight"),
        (r"norm2\.scale", "encoder_attn_layer_norm.weight"),
        (r"norm3\.scale", "final_layer_norm.weight"),
        (r"gateway\.norm\.scale", "gateway.norm.weight"),
    ),
}
_BLOCKS = {
    "cv1": "conv1",
    "cv2.0": "csp_rep1",
    "cv2.1": "csp_rep1.conv2",
    "cv3.0": "csp_rep2",
    "cv3.1": "csp_rep2.conv2",
    "cv4": "conv2",
}
_BLOCK = r"encoder\.((?:fpn|pan)_block(?:s\.\d)?)\.(cv[14]|cv[23]\.\d)\.(.+)"
_STEPS = (
    (r"encoder\.down_sample([12])\.1\.", r"model.encoder.down_conv\1.conv."),
    (r"encoder\.down_sample([12])\.2\.", r"model.encoder.down_conv\1.norm."),
    (r"encoder\.bi_fusion\.cv\.", "model.encoder.bi_fusion_conv."),
)


def convert(tensors: Mapping[str, Tensor], place: str, discrete: bool = False) -> Imported:
    """Our detector of a checkpoint's state dict.

    Args:
        tensors: The state dict; the average's, where there is one.
        place: The source, for messages.
        discrete: It samples whole cells; nothing in the tensors tells.

    Raises:
        UserError: ``weights-backbone`` for another backbone than an HGNetv2 or a DINOv3,
            ``weights-config`` for a variant we have no architecture for, and what
            :func:`detr.models.weights.hugging_face.convert` raises.
    """
    if dinov3.MARK not in tensors and "backbone.stem.stem1.conv.weight" not in tensors:
        raise UserError("weights-backbone", f"{place}: the backbone is no HGNetv2 and no DINOv3")
    if any(name.startswith("decoder.tgt_embed.") for name in tensors):
        raise UserError("weights-config", f"{place}: learn_query_content is not supported")
    named: dict[str, Tensor] = {}
    for name, tensor in split_projections(tensors).items():
        if found := re.fullmatch(r"decoder\.(decoder\.layers\.\d+)\.swish_ffn\.w12\.(.+)", name):
            gate, value = tensor.chunk(2)
            layer = f"model.{found[1]}.mlp"
            named[f"{layer}.gate_proj.{found[2]}"] = gate
            named[f"{layer}.up_proj.{found[2]}"] = value
        else:
            named[_translated(name)] = tensor
    named = dinov3.translated(named)
    told = {**_published(tensors, place), "decoder_method": "discrete" if discrete else "default"}
    return hugging_face.convert(told, named, place)


def _published(tensors: Mapping[str, Tensor], place: str) -> dict[str, Any]:
    """What the transformers library's ``config.json`` would say."""
    lite = _LITE in tensors
    block = "encoder.fpn_block" if lite else "encoder.fpn_blocks.0"
    layer = "decoder.decoder.layers.0"
    told = original_d_fine.published(tensors, block)
    if dinov3.MARK in tensors:
        told["backbone_config"] = dinov3.published_of(tensors, place)
        told["spatial_tuning_adapter_inplanes"] = len(tensors[dinov3.MARK])
    if lite:
        told["feat_strides"] = told["feat_strides"][:1]
    return {
        **told,
        "model_type": "deimv2",
        "encoder_type": "lite" if lite else "hybrid",
        "encoder_has_trailing_conv": f"{block}.cv2.1.conv.weight" in tensors,
        "decoder_activation_function": "silu",
        "decoder_ffn_dim": len(tensors[f"{layer}.swish_ffn.w12.weight"]),
        "use_gateway": f"{layer}.gateway.gate.weight" in tensors,
        "share_bbox_head": _alike(tensors, "decoder.dec_bbox_head"),
    }


def _alike(tensors: Mapping[str, Tensor], heads: str) -> bool:
    """Whether all of some heads are one."""
    first = {n: x for n, x in tensors.items() if n.startswith(f"{heads}.0.")}
    return all(
        torch.equal(x, tensors[name.replace(f"{heads}.0.", f"{heads}.{i}.")])
        for name, x in first.items()
        for i in range(1, depth(tensors, heads))
    )


def _translated(name: str) -> str:
    """A name in the transformers library's terms."""
    if found := re.match(_BLOCK, name):
        return f"model.encoder.{found[1]}.{_BLOCKS[found[2]]}.{found[3]}"
    for pattern, replacement in _STEPS:
        name, count = re.subn(f"^{pattern}", replacement, name)
        if count:
            return name
    kind = "encoder" if name.startswith("encoder.") else "decoder"
    return original_d_fine.translated(name, (*_LAYER, *_NORMS[kind]))
