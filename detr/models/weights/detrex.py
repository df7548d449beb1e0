"""detrex and Stable-DINO: the original repositories' networks under other names.

Its DINO has other positions and heads than the original one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from detr.config import PositionsConfig

MARK = "transformer.encoder.layers.0.ffns.0.layers.0.0.weight"
# Deformable DETR's image positions instead of DINO's.
DINO_POSITIONS = PositionsConfig(temperature=10000.0, offset=-0.5)

_LEVELS = "transformer.level_embeds"
_ENCODER = r"transformer\.encoder\.layers\.(\d+)\."
_DECODER = r"transformer\.decoder\.layers\.(\d+)\."
_LAYER = r"transformer\.(encoder|decoder)\.layers\.(\d+)\."
_IN_DECODER = r"transformer.decoder.layers.\1."
_BACKBONE = (
    # Swin and ConvNeXt keep their authors' names.
    (r"backbone\.(patch_embed|layers|downsample_layers|stages|norm\d)\.", r"backbone.0.\1."),
    (r"backbone\.stem\.conv1\.weight", "backbone.0.body.conv1.weight"),
    (r"backbone\.stem\.conv1\.norm\.", "backbone.0.body.bn1."),
    (r"backbone\.res(\d)\.(\d+)\.conv(\d)\.norm\.", r"backbone.0.body.layer\1.\2.bn\3."),
    (r"backbone\.res(\d)\.(\d+)\.conv(\d)\.", r"backbone.0.body.layer\1.\2.conv\3."),
    (
        r"backbone\.res(\d)\.(\d+)\.shortcut\.norm\.",
        r"backbone.0.body.layer\1.\2.downsample.1.",
    ),
    (r"backbone\.res(\d)\.(\d+)\.shortcut\.", r"backbone.0.body.layer\1.\2.downsample.0."),
)
_NAMES = (
    *_BACKBONE,
    (r"transformer\.level_embeds", "transformer.level_embed"),
    (r"transformer\.decoder\.post_norm_layer\.", "transformer.decoder.norm."),
    (r"anchor_box_embed\.", "refpoint_embed."),
    (r"query_embedding\.", "query_embed."),
    (r"denoising_generator\.label_encoder\.", "label_enc."),
    (rf"{_ENCODER}attentions\.0\.(?:attn\.)?", r"transformer.encoder.layers.\1.self_attn."),
    (rf"{_ENCODER}norms\.0\.", r"transformer.encoder.layers.\1.norm1."),
    (rf"{_ENCODER}norms\.1\.", r"transformer.encoder.layers.\1.norm2."),
    (rf"{_DECODER}attentions\.0\.attn\.", rf"{_IN_DECODER}self_attn."),
    (rf"{_DECODER}norms\.2\.", rf"{_IN_DECODER}norm3."),
    (rf"{_LAYER}ffns\.0\.layers\.0\.0\.", r"transformer.\1.layers.\2.linear1."),
    (rf"{_LAYER}ffns\.0\.(?:activation|layers\.0\.1)\.", r"transformer.\1.layers.\2.activation."),
    (rf"{_LAYER}ffns\.0\.layers\.1\.", r"transformer.\1.layers.\2.linear2."),
)
# Conditional attention's projections.
_LETTERS = {"query": "q", "key": "k"}
_CONDITIONAL = tuple(
    (
        rf"{_DECODER}attentions\.{number}\.{long}_(content|pos|pos_sine)_proj\.",
        rf"{_IN_DECODER}{short}_{letter}\2_proj.",
    )
    for number, short in enumerate(("sa", "ca"))
    for long, letter in _LETTERS.items()
)
_DENSE = (
    *_CONDITIONAL,
    (rf"{_DECODER}attentions\.0\.value_proj\.", rf"{_IN_DECODER}sa_v_proj."),
    (rf"{_DECODER}attentions\.1\.value_proj\.", rf"{_IN_DECODER}ca_v_proj."),
    (rf"{_DECODER}attentions\.0\.out_proj\.", rf"{_IN_DECODER}self_attn.out_proj."),
    (rf"{_DECODER}attentions\.1\.out_proj\.", rf"{_IN_DECODER}cross_attn.out_proj."),
    (rf"{_DECODER}attentions\.1\.attn\.", rf"{_IN_DECODER}multihead_attn."),
    (rf"{_DECODER}norms\.0\.", rf"{_IN_DECODER}norm1."),
    (rf"{_DECODER}norms\.1\.", rf"{_IN_DECODER}norm2."),
)
# Norms are in the order they run; where it samples, the original counts cross-attention's first.
_SAMPLED = (
    (rf"{_DECODER}attentions\.1\.", rf"{_IN_DECODER}cross_attn."),
    (rf"{_DECODER}norms\.0\.", rf"{_IN_DECODER}norm2."),
    (rf"{_DECODER}norms\.1\.", rf"{_IN_DECODER}norm1."),
)
_NECK = {"conv": 0, "norm": 1}


def original_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict under the names of its original repository."""
    table = (*(_SAMPLED if _LEVELS in tensors else _DENSE), *_NAMES)
    dino = "transformer.tgt_embed.weight" in tensors
    maps = len({m[1] for n in tensors if (m := re.match(r"neck\.convs\.(\d+)\.", n))})
    layers = len({m[1] for n in tensors if (m := re.match(_DECODER, n))})

    def renamed(name: str) -> str:
        if found := re.fullmatch(r"neck\.(extra_)?convs\.(\d+)\.(conv|norm)\.(.+)", name):
            number = int(found[2]) + (maps if found[1] else 0)
            return f"input_proj.{number}.{_NECK[found[3]]}.{found[4]}"
        # DINO's pair of heads after the decoder layers' is the encoder's.
        if dino and (
            found := re.fullmatch(
                rf"(?:transformer\.decoder\.)?(class|bbox)_embed\.{layers}\.(.+)", name
            )
        ):
            return f"transformer.enc_out_{found[1]}_embed.{found[2]}"
        return _renamed(name, table)

    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        # Heads are listed twice, with and without their place in the decoder.
        result.setdefault(renamed(name), tensor)
    return result


def backbone_name(name: str) -> str:
    """A backbone's tensor under the name of the original repositories; others keep theirs."""
    return _renamed(name, _BACKBONE)


def _renamed(name: str, table: Sequence[tuple[str, str]]) -> str:
    """By the first substitution that fits; detectron2 counts a ResNet's stages from the stem on."""
    if found := re.match(r"backbone\.res(\d)", name):
        name = f"backbone.res{int(found[1]) - 1}{name[found.end() :]}"
    for pattern, replacement in table:
        changed, count = re.subn(f"^{pattern}", replacement, name)
        if count:
            return changed
    return name
