"""mmdet's detectors (version 3): the original repositories' networks under other names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

MARK = "encoder.layers.0.ffn.layers.0.0.weight"
_LEVELS = "level_embed"
_PROPOSALS = "memory_trans_fc.weight"

_LAYER = r"(encoder|decoder)\.layers\.(\d+)\."
_ENCODER, _DECODER = r"encoder\.layers\.(\d+)\.", r"decoder\.layers\.(\d+)\."
_OURS = r"transformer.\1.layers.\2."
_IN_DECODER = r"transformer.decoder.layers.\1."
_BLOCK = r"backbone\.stages\.(\d)\.blocks\.(\d+)\."
_SWIN = "backbone.0.layers."
_NAMES = (
    (r"backbone\.patch_embed\.projection\.", "backbone.0.patch_embed.proj."),
    (rf"{_BLOCK}attn\.w_msa\.", rf"{_SWIN}\1.blocks.\2.attn."),
    (rf"{_BLOCK}ffn\.layers\.0\.0\.", rf"{_SWIN}\1.blocks.\2.mlp.fc1."),
    (rf"{_BLOCK}ffn\.layers\.1\.", rf"{_SWIN}\1.blocks.\2.mlp.fc2."),
    (r"backbone\.stages\.", _SWIN),
    (r"backbone\.(patch_embed|norm\d)\.", r"backbone.0.\1."),
    (r"backbone\.", "backbone.0.body."),
    (r"level_embed", "transformer.level_embed"),
    (r"reference_points_fc\.", "transformer.reference_points."),
    (r"memory_trans_fc\.", "transformer.enc_output."),
    (r"memory_trans_norm\.", "transformer.enc_output_norm."),
    (r"pos_trans_fc\.", "transformer.pos_trans."),
    (r"pos_trans_norm\.", "transformer.pos_trans_norm."),
    (r"dn_query_generator\.label_embedding\.", "label_enc."),
    (r"patterns\.", "transformer.patterns."),
    (rf"{_ENCODER}norms\.0\.", r"transformer.encoder.layers.\1.norm1."),
    (rf"{_ENCODER}norms\.1\.", r"transformer.encoder.layers.\1.norm2."),
    (rf"{_DECODER}norms\.2\.", rf"{_IN_DECODER}norm3."),
    (rf"{_LAYER}self_attn\.attn\.", rf"{_OURS}self_attn."),
    (rf"{_DECODER}cross_attn\.attn\.", rf"{_IN_DECODER}multihead_attn."),
    (rf"{_DECODER}self_attn\.(\w+_proj)\.(?<!out_proj\.)", rf"{_IN_DECODER}sa_\2."),
    (rf"{_LAYER}ffn\.layers\.0\.0\.", rf"{_OURS}linear1."),
    (rf"{_LAYER}ffn\.layers\.0\.1\.", rf"{_OURS}activation."),
    (rf"{_LAYER}ffn\.layers\.1\.", rf"{_OURS}linear2."),
    (r"decoder\.post_norm\.", "transformer.decoder.norm."),
    (r"(encoder|decoder)\.", r"transformer.\1."),
    (r"bbox_head\.fc_cls\.", "class_embed."),
    (r"bbox_head\.cls_branches\.", "class_embed."),
    (r"bbox_head\.fc_reg\.layers\.", "bbox_embed.layers."),
    (r"bbox_head\.reg_ffn\.layers\.0\.0\.", "bbox_embed.layers.0."),
    (r"bbox_head\.reg_ffn\.layers\.1\.", "bbox_embed.layers.1."),
    (r"bbox_head\.fc_reg\.", "bbox_embed.layers.2."),
)
# A decoder of dense attention; the original counts cross-attention's norm first where it samples,
# and mmdet in the order they run.
_DENSE = (
    (rf"{_DECODER}cross_attn\.(\w+_proj)\.(?<!out_proj\.)", rf"{_IN_DECODER}ca_\2."),
    (rf"{_DECODER}norms\.0\.", rf"{_IN_DECODER}norm1."),
    (rf"{_DECODER}norms\.1\.", rf"{_IN_DECODER}norm2."),
    (r"neck\.convs\.0\.conv\.", "input_proj."),
)
_SAMPLED = (
    (rf"{_DECODER}norms\.0\.", rf"{_IN_DECODER}norm2."),
    (rf"{_DECODER}norms\.1\.", rf"{_IN_DECODER}norm1."),
)
_MERGING = re.compile(r"backbone\.stages\.\d\.downsample\.(?:reduction|norm)\.(?:weight|bias)")
_NECK = {"conv": 0, "gn": 1}


def original_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An mmdet detector's state dict under the names of its original repository."""
    sampled = _LEVELS in tensors
    table = (*(_SAMPLED if sampled else _DENSE), *_queries(tensors), *_NAMES)
    maps = len({m[1] for n in tensors if (m := re.match(r"neck\.convs\.(\d+)\.", n))})
    layers = len({m[1] for n in tensors if (m := re.match(_DECODER, n))})

    def renamed(name: str) -> str:
        if sampled and (
            found := re.fullmatch(r"neck\.(extra_)?convs\.(\d+)\.(conv|gn)\.(.+)", name)
        ):
            number = int(found[2]) + (maps if found[1] else 0)
            return f"input_proj.{number}.{_NECK[found[3]]}.{found[4]}"
        if found := re.fullmatch(r"bbox_head\.reg_branches\.(\d+)\.(\d)\.(.+)", name):
            # Linear maps with a ReLU after each but the last.
            name = f"bbox_embed.{found[1]}.layers.{int(found[2]) // 2}.{found[3]}"
        for pattern, replacement in table:
            changed, count = re.subn(f"^{pattern}", replacement, name)
            if count:
                name = changed
                break
        # DINO's pair of heads after the decoder layers' is the encoder's.
        if is_dino(tensors):
            name = re.sub(
                rf"^(class|bbox)_embed\.{layers}\.", r"transformer.enc_out_\1_embed.", name
            )
        return name

    result = {
        renamed(name): _merging(x) if _MERGING.fullmatch(name) else x for name, x in tensors.items()
    }
    for name, x in list(result.items()):
        if re.fullmatch(r"input_proj\.\d+\.0\.weight", name):
            # A convolution before a norm has no bias there.
            result.setdefault(name.replace("weight", "bias"), x.new_zeros(len(x)))
    return result


def _merging(x: Tensor) -> Tensor:
    """A Swin's merging of four patches, whose channels the original lists patch by patch.

    mmdet lists the four patches of each channel, by rows instead of columns.
    """
    by_patch = x.reshape(*x.shape[:-1], -1, 4).transpose(-1, -2)
    return by_patch[..., [0, 2, 1, 3], :].reshape(x.shape)


def options(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the names do not tell, in the words of the original command lines.

    Refined and plain Deformable DETR have the same names; the plain one's heads are one.
    """
    first = "bbox_head.reg_branches.0."
    alike = all(
        torch.equal(tensors[name], tensors[name.replace(".0.", ".1.", 1)])
        for name in tensors
        if name.startswith(first) and name.replace(".0.", ".1.", 1) in tensors
    )
    return {"with_box_refine": not alike}


def is_dino(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the queries of two stages have learned content."""
    return _PROPOSALS in tensors and "query_embedding.weight" in tensors


def _queries(tensors: Mapping[str, Tensor]) -> tuple[tuple[str, str], ...]:
    """The table of queries: DINO's content, DAB-DETR's anchors, or queries."""
    if is_dino(tensors):
        return ((r"query_embedding\.", "transformer.tgt_embed."),)
    anchors = "decoder.ref_anchor_head.layers.0.weight" in tensors
    return ((r"query_embedding\.", "refpoint_embed." if anchors else "query_embed."),)
