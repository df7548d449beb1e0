"""detrex's DINO: the same network under other names, with other positions and heads."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from detr.config import PositionsConfig

MARK = "transformer.level_embeds"
# Deformable DETR's image positions instead of DINO's.
POSITIONS = PositionsConfig(temperature=10000.0, offset=-0.5)

_ENCODER = r"transformer\.encoder\.layers\.(\d+)\."
_DECODER = r"transformer\.decoder\.layers\.(\d+)\."
_NAMES = (
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
    (r"transformer\.level_embeds", "transformer.level_embed"),
    (rf"{_ENCODER}attentions\.0\.", r"transformer.encoder.layers.\1.self_attn."),
    (rf"{_ENCODER}norms\.0\.", r"transformer.encoder.layers.\1.norm1."),
    (rf"{_ENCODER}norms\.1\.", r"transformer.encoder.layers.\1.norm2."),
    (rf"{_DECODER}attentions\.0\.attn\.", r"transformer.decoder.layers.\1.self_attn."),
    (rf"{_DECODER}attentions\.1\.", r"transformer.decoder.layers.\1.cross_attn."),
    # In the order they run; the original counts cross-attention's norm first.
    (rf"{_DECODER}norms\.0\.", r"transformer.decoder.layers.\1.norm2."),
    (rf"{_DECODER}norms\.1\.", r"transformer.decoder.layers.\1.norm1."),
    (rf"{_DECODER}norms\.2\.", r"transformer.decoder.layers.\1.norm3."),
    (
        r"transformer\.(encoder|decoder)\.layers\.(\d+)\.ffns\.0\.layers\.0\.0\.",
        r"transformer.\1.layers.\2.linear1.",
    ),
    (
        r"transformer\.(encoder|decoder)\.layers\.(\d+)\.ffns\.0\.layers\.1\.",
        r"transformer.\1.layers.\2.linear2.",
    ),
)
_NECK = {"conv": 0, "norm": 1}


def original_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A detrex DINO's state dict under the names of the original DINO."""
    maps = len({m[1] for n in tensors if (m := re.match(r"neck\.convs\.(\d+)\.", n))})
    layers = len({m[1] for n in tensors if (m := re.match(_DECODER, n))})

    def renamed(name: str) -> str:
        if found := re.fullmatch(r"neck\.(extra_)?convs\.(\d+)\.(conv|norm)\.(.+)", name):
            number = int(found[2]) + (maps if found[1] else 0)
            return f"input_proj.{number}.{_NECK[found[3]]}.{found[4]}"
        # The pair of heads after the decoder layers' is the encoder's.
        if found := re.fullmatch(
            rf"(?:transformer\.decoder\.)?(class|bbox)_embed\.{layers}\.(.+)", name
        ):
            return f"transformer.enc_out_{found[1]}_embed.{found[2]}"
        if found := re.match(r"backbone\.res(\d)", name):
            name = f"backbone.res{int(found[1]) - 1}{name[found.end() :]}"
        for pattern, replacement in _NAMES:
            changed, count = re.subn(f"^{pattern}", replacement, name)
            if count:
                return changed
        return name

    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        # Heads are listed twice, with and without their place in the decoder.
        result.setdefault(renamed(name), tensor)
    return result
