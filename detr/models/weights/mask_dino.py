"""IDEA-Research/MaskDINO: DINO's network under detectron2's names, with pixels and masks.

Its two feature orders differ in which way encoder and decoder count levels; ours count from the
finest on, so what is per level is turned round where theirs do not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from detr.errors import UserError
from detr.models.weights import detrex

_HEAD = "sem_seg_head."
# Only this repository's checkpoints have it.
MARK = f"{_HEAD}predictor.mask_embed.layers.0.weight"
# The same of what :func:`original_names` makes of them.
PIXELS = "mask_features.weight"
_HEADS = 8  # in every published config; nothing in the tensors tells
_PIXELS, _PREDICTOR = r"sem_seg_head\.pixel_decoder\.", r"sem_seg_head\.predictor\."
_NAMES = (
    (rf"{_PIXELS}transformer\.", "transformer."),
    (_PIXELS, ""),
    (rf"{_PREDICTOR}(?:decoder_norm|decoder\.norm)\.", "transformer.decoder.norm."),
    (rf"{_PREDICTOR}decoder\.bbox_embed\.", "bbox_embed."),
    (rf"{_PREDICTOR}_bbox_embed\.", "bbox_embed.0."),
    (rf"{_PREDICTOR}class_embed\.", "class_embed.0."),
    (rf"{_PREDICTOR}(enc_output|enc_output_norm|decoder)\.", r"transformer.\1."),
    (_PREDICTOR, ""),
)
_PROJECTION = re.compile(r"input_proj\.(\d+)\.")
_PER_LEVEL = re.compile(
    r"transformer\.(encoder|decoder)\.layers\.\d+\.(?:self|cross)_attn\."
    r"(sampling_offsets|attention_weights)\."
)
_BOXES = {"no": "predicted", "bitmask": "bitmask", "mask2box": "mask2box"}
InitialBoxes = Literal["predicted", "bitmask", "mask2box"]


def options(tensors: Mapping[str, Tensor], told: Mapping[str, Any]) -> dict[str, Any]:
    """What the tensors tell of the config, and what its published companions say.

    ``coarse_to_fine``: the first projection is that of the finest map (``FEATURE_ORDER``
    ``low2high``). ``initial_boxes``: of ``INITIALIZE_BOX_TYPE``, which no tensor tells: without
    it, ``mask2box`` for the published ResNet in that order, ``bitmask`` for the others.
    """
    backwards = not _coarsest_first(tensors)
    resnet = "backbone.stem.conv1.weight" in tensors
    usual = "mask2box" if backwards and resnet else "bitmask"
    asked = told.get("initialize_box_type", usual)
    return {"coarse_to_fine": backwards, "initial_boxes": _BOXES.get(asked, asked)}


def original_names(tensors: Mapping[str, Tensor], place: str) -> dict[str, Tensor]:
    """A state dict under the names of the original DINO, levels from the finest on.

    Raises:
        UserError: ``weights-config`` for more than one level beyond the backbone's maps.
    """
    coarsest_first = _coarsest_first(tensors)
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        renamed = detrex.backbone_name(name)
        for pattern, replacement in _NAMES:
            renamed, count = re.subn(f"^{pattern}", replacement, renamed)
            if count:
                break
        # Shared heads are listed once per layer, with and without their place in the decoder.
        result.setdefault(renamed, tensor)
    kernels = {
        int(found[1]): x.shape[-1]
        for name, x in result.items()
        if (found := re.fullmatch(r"input_proj\.(\d+)\.0\.weight", name))
    }
    maps = sum(side == 1 for side in kernels.values())
    if len(kernels) > maps + 1:
        raise UserError(
            "weights-config",
            f"{place}: {len(kernels) - maps} levels beyond the backbone's maps are not supported",
        )
    backwards = "encoder" if coarsest_first else "decoder"
    levels = len(kernels)
    for name, tensor in list(result.items()):
        if (found := _PER_LEVEL.match(name)) and found[1] == backwards:
            result[name] = _turned(tensor, levels)
    if coarsest_first:
        result["transformer.level_embed"] = result["transformer.level_embed"].flip(0)
        result = {
            _PROJECTION.sub(lambda m: f"input_proj.{_mirrored(int(m[1]), maps)}.", name): x
            for name, x in result.items()
        }
    return result


def _coarsest_first(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the first projection is that of the coarsest map, the one with most channels."""
    first, second = (
        tensors[f"{_HEAD}pixel_decoder.input_proj.{i}.0.weight"].shape[1] for i in range(2)
    )
    return first > second


def _mirrored(index: int, maps: int) -> int:
    return maps - 1 - index if index < maps else index


def _turned(tensor: Tensor, levels: int) -> Tensor:
    """A projection to offsets or weights of all heads, with its levels in the other order."""
    return torch.unflatten(tensor, 0, (_HEADS, levels, -1)).flip(1).flatten(0, 2)
