"""Names of LW-DETR's and RF-DETR's tensors in other files than the library's state dicts.

Files of both repositories have names of their own, and so have the folders the transformers library
writes: what it saves goes by the names of the files it was made from, which are RF-DETR's own, and
for LW-DETR those of older releases.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from detr.models.weights.renaming import split_projections

# A tensor that only the repositories' files have, and what the library writes of RF-DETR.
MARK = "backbone.0.projector.stages.0.0.cv1.conv.weight"
_BLOCK = r"backbone\.0\.encoder\.blocks\.(\d+)\."
_LAYER = r"backbone\.0\.encoder\.encoder\.encoder\.layer\.(\d+)\."
_VIT = "model.backbone.backbone."
_HERE = _VIT + r"encoder.layer.\1."
_SCALE = r"model.backbone.projector.scale_layers.\1."
_STAGE = r"backbone\.0\.projector\.stages\.(\d+)\."
_DECODER = r"transformer\.decoder\.layers\.(\d+)\."
# What it writes of LW-DETR, with and without heads.
_SAVED = r"((?:model\.)?backbone\.backbone\.encoder\.layer\.\d+\.attention\.)"
_OLDER: Sequence[tuple[str, str]] = (
    (rf"{_SAVED}attention\.query\.", r"\1q_proj."),
    (rf"{_SAVED}attention\.key\.", r"\1k_proj."),
    (rf"{_SAVED}attention\.value\.", r"\1v_proj."),
    (rf"{_SAVED}output\.", r"\1o_proj."),
)
_NAMES: Sequence[tuple[str, str]] = (
    (r"backbone\.0\.encoder\.pos_embed", f"{_VIT}embeddings.position_embeddings"),
    (r"backbone\.0\.encoder\.patch_embed\.proj\.", f"{_VIT}embeddings.projection."),
    (rf"{_BLOCK}norm1\.", _HERE + "layernorm_before."),
    (rf"{_BLOCK}norm2\.", _HERE + "layernorm_after."),
    (rf"{_BLOCK}mlp\.", _HERE + "intermediate."),
    (rf"{_BLOCK}attn\.proj\.", _HERE + "attention.o_proj."),
    (rf"{_BLOCK}attn\.([qkv])_bias", _HERE + r"attention.\2_proj.bias"),
    (rf"{_BLOCK}attn\.", _HERE + "attention."),
    (_BLOCK, _HERE),
    (rf"{_LAYER}attention\.attention\.query\.", _HERE + "attention.q_proj."),
    (rf"{_LAYER}attention\.attention\.key\.", _HERE + "attention.k_proj."),
    (rf"{_LAYER}attention\.attention\.value\.", _HERE + "attention.v_proj."),
    (rf"{_LAYER}attention\.output\.dense\.", _HERE + "attention.o_proj."),
    (_LAYER, _HERE),
    (r"backbone\.0\.encoder\.encoder\.", _VIT),
    (rf"{_STAGE}0\.cv([12])\.", _SCALE + r"projector_layer.conv\2."),
    (rf"{_STAGE}0\.m\.(\d+)\.cv([12])\.", _SCALE + r"projector_layer.bottlenecks.\2.conv\3."),
    (rf"{_STAGE}1\.", _SCALE + "layer_norm."),
    (
        r"backbone\.0\.projector\.stages_sampling\.(\d+)\.(\d+)\.",
        _SCALE + r"sampling_layers.\2.layers.",
    ),
    (rf"{_DECODER}norm1\.", r"model.decoder.layers.\1.self_attn_layer_norm."),
    (rf"{_DECODER}norm2\.", r"model.decoder.layers.\1.cross_attn_layer_norm."),
    (rf"{_DECODER}norm3\.", r"model.decoder.layers.\1.layer_norm."),
    (rf"{_DECODER}linear([12])\.", r"model.decoder.layers.\1.mlp.fc\2."),
    (r"transformer\.decoder\.norm\.", "model.decoder.layernorm."),
    (r"transformer\.", "model."),
    (r"refpoint_embed\.", "model.reference_point_embed."),
    (r"query_feat\.", "model.query_feat."),
)


def library_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names of the library's state dict; those that have them keep them."""
    if MARK not in tensors:
        return {_translated(name, _OLDER): x for name, x in tensors.items()}
    named: dict[str, Tensor] = {}
    for name, tensor in split_projections(tensors).items():
        if joined := re.fullmatch(rf"{_BLOCK}attn\.qkv\.(weight|bias)", name):
            here = f"{_VIT}encoder.layer.{joined[1]}.attention."
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                named[f"{here}{letter}_proj.{joined[2]}"] = part
        else:
            named[_translated(name, _NAMES)] = tensor
    return named


def _translated(name: str, table: Sequence[tuple[str, str]]) -> str:
    """A name in the library's terms."""
    for pattern, replacement in table:
        changed, count = re.subn(f"^{pattern}", replacement, name)
        if count:
            name = changed
            break
    # Norms after convolutions.
    return re.sub(r"^(model\.backbone\.projector\..+)\.bn\.", r"\1.norm.", name)
