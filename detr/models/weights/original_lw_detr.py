"""Checkpoints of the LW-DETR and RF-DETR repositories.

As :mod:`original_rt_detr`: the architecture is read off names and shapes, and said in the words of
the transformers library; :mod:`lw_detr_names` has the names. What no tensor tells – which blocks
have windows, how many, and where maps are taken – the training's options do, where the file
has them; otherwise it is that of the published size with as many blocks or such patches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from detr.errors import UserError
from detr.models.weights import hugging_face
from detr.models.weights.imported import Imported
from detr.models.weights.lw_detr_names import MARK
from detr.models.weights.original_rt_detr import depth

_PLAIN = "backbone.0.encoder.pos_embed"
_DINO = "backbone.0.encoder.encoder.embeddings.position_embeddings"
# Channels of an attention head in both, of a deformable one, and of their ViTs' and DINOv2s'.
_HEAD, _SAMPLING_HEAD, _VIT_HEADS, _DINO_HEAD = 32, 16, 12, 64
# LW-DETR's sizes: blocks with windows and the last block before each map, by number of blocks.
_VITS = {6: ((0, 2, 4), (1, 3, 5)), 10: ((0, 1, 3, 6, 7, 9), (2, 4, 5, 9))}
# RF-DETR's sizes: windows and maps, by pixels and positions in a row; of all positions as well.
_DINOS = {
    (14, None): (4, (2, 5, 8, 11)),
    (16, None): (2, (3, 6, 9, 12)),
    (20, 35): (1, (3, 6, 9, 12)),
    (20, 44): (2, (3, 6, 9, 12)),
}


def convert(
    tensors: Mapping[str, Tensor], place: str, options: Mapping[str, Any] | None = None
) -> Imported:
    """Our detector of a checkpoint's state dict.

    Args:
        tensors: The state dict; the average's, where there is one.
        place: The source, for messages.
        options: The training's, where the checkpoint tells them.

    Raises:
        UserError: ``weights-backbone`` for another backbone than a ViT or DINOv2,
            ``weights-config`` for a variant we have no architecture for, and what
            :func:`detr.models.weights.hugging_face.convert` raises.
    """
    told = options or {}
    if any(name.startswith("segmentation_head.") for name in tensors):
        raise UserError("weights-config", f"{place}: RF-DETR's segmentation head is not supported")
    if _PLAIN in tensors:
        backbone = _vit(tensors, told, place)
    elif _DINO in tensors:
        backbone = _dino(tensors, told, place)
    else:
        raise UserError("weights-backbone", f"{place}: the backbone is no ViT and no DINOv2")
    return hugging_face.convert(_published(tensors, backbone), tensors, place)


def _vit(tensors: Mapping[str, Tensor], told: Mapping[str, Any], place: str) -> dict[str, Any]:
    """LW-DETR's backbone, as the library's ``config.json`` has it."""
    kernel = _kernel(tensors, "backbone.0.encoder.patch_embed.proj.weight")
    blocks = depth(tensors, "backbone.0.encoder.blocks")
    windowed, last = _VITS.get(blocks, (None, None))
    windowed = told.get("window_block_indexes") or windowed
    last = told.get("out_feature_indexes") or last
    if windowed is None or last is None:
        raise UserError(
            "weights-config",
            f"{place}: no published size has {blocks} blocks, and the file does not tell which "
            "have windows",
        )
    side = math.isqrt(tensors[_PLAIN].shape[1] - 1)
    return {
        "model_type": "lw_detr_vit",
        "hidden_size": tensors[_PLAIN].shape[2],
        "num_hidden_layers": blocks,
        "num_attention_heads": _VIT_HEADS,
        "patch_size": kernel,
        "pretrain_image_size": side * kernel,
        "window_block_indices": list(windowed),
        "out_indices": [int(i) % blocks + 1 for i in last],
    }


def _dino(tensors: Mapping[str, Tensor], told: Mapping[str, Any], place: str) -> dict[str, Any]:
    """RF-DETR's backbone, as the library's ``config.json`` has it."""
    prefix = "backbone.0.encoder.encoder"
    kernel = _kernel(tensors, f"{prefix}.embeddings.patch_embeddings.projection.weight")
    side = math.isqrt(tensors[_DINO].shape[1] - 1)
    windows, taps = _DINOS.get((kernel, side)) or _DINOS.get((kernel, None)) or (None, None)
    windows = told.get("num_windows") or windows
    taps = told.get("out_feature_indexes") or taps
    if windows is None or taps is None:
        raise UserError(
            "weights-config",
            f"{place}: no published size has patches of {kernel} pixels, and the file does not "
            "tell its windows",
        )
    if f"{prefix}.embeddings.register_tokens" in tensors:
        raise UserError("weights-config", f"{place}: register tokens are not supported")
    width = tensors[_DINO].shape[2]
    return {
        "model_type": "rf_detr_dinov2",
        "hidden_size": width,
        "num_hidden_layers": depth(tensors, f"{prefix}.encoder.layer"),
        "num_attention_heads": width // _DINO_HEAD,
        "patch_size": kernel,
        "image_size": side * kernel,
        "num_windows": int(windows),
        "out_indices": [int(i) for i in taps],
    }


def _kernel(tensors: Mapping[str, Tensor], name: str) -> int:
    return int(tensors[name].shape[-1])


def _published(tensors: Mapping[str, Tensor], backbone: dict[str, Any]) -> dict[str, Any]:
    """What the transformers library's ``config.json`` would say."""
    layer = "transformer.decoder.layers.0"
    width = len(tensors[f"{layer}.norm1.weight"])
    groups = depth(tensors, "transformer.enc_output")
    scales = [_scale(tensors, i) for i in range(depth(tensors, "backbone.0.projector.stages"))]
    heads = width // _SAMPLING_HEAD
    samples = len(tensors[f"{layer}.cross_attn.attention_weights.bias"])
    inner = len(tensors[MARK]) // 2
    classes = len(tensors["class_embed.bias"]) if "class_embed.bias" in tensors else 0
    return {
        "model_type": "rf_detr" if _DINO in tensors else "lw_detr",
        "id2label": {str(i): f"class-{i}" for i in range(classes)},
        "backbone_config": backbone,
        "projector_scale_factors": scales,
        "hidden_expansion": inner / width,
        "c2f_num_blocks": depth(tensors, "backbone.0.projector.stages.0.0.m"),
        "layer_norm_eps": 1e-6,
        "dropout": 0.0,
        "d_model": width,
        "decoder_self_attention_heads": width // _HEAD,
        "decoder_cross_attention_heads": heads,
        "decoder_n_points": samples // (heads * len(scales)),
        "decoder_ffn_dim": len(tensors[f"{layer}.linear1.weight"]),
        "decoder_layers": depth(tensors, "transformer.decoder.layers"),
        "num_queries": len(tensors["refpoint_embed.weight"]) // groups,
        "group_detr": groups,
    }


def _scale(tensors: Mapping[str, Tensor], level: int) -> float:
    """How a level resamples the backbone's maps, by what it does it with."""
    first = f"backbone.0.projector.stages_sampling.{level}.0.0."
    if f"{first}weight" in tensors:
        return 2.0
    if f"{first}conv.weight" not in tensors:
        return 1.0
    return 0.5 if _kernel(tensors, f"{first}conv.weight") == 3 else 2.0
