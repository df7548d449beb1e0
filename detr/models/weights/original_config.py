"""The architecture of an original checkpoint, from its names and shapes.

What the tensors do not tell (heads, positions, dilation) comes from the training's command line,
where the checkpoint has it, and is the repository's default otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from math import isqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from detr.config import (
    BackboneConfig,
    DetectorConfig,
    OneToManyConfig,
    PlainDenoisingConfig,
    merged,
)
from detr.errors import UserError
from detr.presets import FAMILIES


class Source(NamedTuple):
    """A checkpoint.

    Attributes:
        tensors: The state dict.
        told: The training's command line; empty where nothing is known.
        place: For messages.
    """

    tensors: Mapping[str, Tensor]
    told: Mapping[str, Any]
    place: str


FamilyOf = Callable[[Source], DetectorConfig]

# ResNet by blocks of its third stage and convolutions of a block.
_RESNETS = {(2, 2): "resnet18", (6, 2): "resnet34", (6, 3): "resnet50", (23, 3): "resnet101"}
# Swin by width, blocks of its third stage and window.
_SWINS = {
    (96, 6, 7): "swin_tiny_patch4_window7_224",
    (96, 18, 7): "swin_small_patch4_window7_224",
    (128, 18, 7): "swin_base_patch4_window7_224",
    (128, 18, 12): "swin_base_patch4_window12_384",
    (192, 18, 7): "swin_large_patch4_window7_224",
    (192, 18, 12): "swin_large_patch4_window12_384",
}
# ConvNeXt by width and blocks of its third stage.
_CONVNEXTS = {
    (96, 9): "convnext_tiny",
    (96, 27): "convnext_small",
    (128, 27): "convnext_base",
    (192, 27): "convnext_large",
    (256, 27): "convnext_xlarge",
}
# What stands before the names of a ConvNeXt's tensors.
CONVNEXT = "backbone.0."
_STRIDES = (4, 8, 16, 32)
# Stable-DINO's memory fusion.
_FUSION = "transformer.encoder.fusion_layer.0.weight"
# Queries of H-Deformable-DETR that only training has.
_ONE_TO_MANY = 1500
# Command-line options of the original repositories that would make another architecture.
_PLAIN: dict[str, Any] = {
    "pre_norm": False,
    "masks": False,
    "position_embedding": "sine",
    "two_stage_pat_embed": 0,
    "two_stage_add_query_num": 0,
    "two_stage_learn_wh": False,
    "decoder_sa_type": "sa",
    "add_channel_attention": False,
    "use_deformable_box_attn": False,
}


def read(
    tensors: Mapping[str, Tensor], told: Mapping[str, Any], place: str, family: FamilyOf
) -> DetectorConfig:
    """The config of a checkpoint.

    Args:
        tensors: The state dict, under original names.
        told: The training's command line.
        place: The source, for messages.
        family: The family's detector, of the checkpoint's kind and number of queries.

    Raises:
        UserError: ``weights-config`` for an option that makes another architecture, or
            ``weights-backbone``.
    """
    for option, wanted in _PLAIN.items():
        if told.get(option, wanted) != wanted:
            raise UserError("weights-config", f"{place}: {option} {told[option]} is not supported")
    source = Source(tensors, told, place)
    config = family(source)
    deformable = config.decoder.cross_attention.samples
    outputs = class_count(tensors)
    first = tensors["transformer.decoder.layers.0.linear1.weight"]
    heads = int(told.get("nheads", 8))
    changes: dict[str, Any] = {
        "num_classes": 1 if outputs is None else outputs - config.heads.classes.no_object,
        "width": first.shape[1],
        "attention_heads": heads,
        "backbone": _backbone(source, deformable),
        **{
            part: {
                "layers": _depth(tensors, f"transformer.{part}.layers"),
                "ffn": len(tensors.get(f"transformer.{part}.layers.0.linear1.weight", first)),
            }
            for part in ("encoder", "decoder")
        },
    }
    if deformable:
        levels = len(tensors["transformer.level_embed"])
        offsets = tensors["transformer.decoder.layers.0.cross_attn.sampling_offsets.bias"]
        points = {"points": len(offsets) // (2 * heads * levels)}
        sampled = {"encoder": points, "decoder": {"cross_attention": points}}
        changes = merged(changes, {"neck": {"levels": levels}, **sampled})
    return config.replace(**changes)


def class_count(tensors: Mapping[str, Tensor]) -> int | None:
    """Outputs of the class head; ``None`` where it was cut off."""
    names = ("class_embed.0.bias", "class_embed.bias")
    return next((len(tensors[name]) for name in names if name in tensors), None)


def dense(source: Source) -> DetectorConfig:
    """DETR."""
    return FAMILIES["detr"].replace(queries=_learned(source))


def conditional(source: Source) -> DetectorConfig:
    """Conditional DETR."""
    return FAMILIES["conditional-detr"].replace(queries=_learned(source))


def dab(source: Source) -> DetectorConfig:
    """DAB-DETR and DN-DAB-DETR."""
    patterns = source.tensors.get("transformer.patterns.weight")
    learned = "transformer.encoder.layers.0.activation.weight" in source.tensors
    activation = {"activation": "prelu" if learned else "relu"}
    return FAMILIES["dab-detr"].replace(
        positions={"temperature": _temperature(source)},
        encoder=activation,
        queries={**_anchors(source), "patterns": 0 if patterns is None else len(patterns)},
        decoder=activation,
    )


def dab_deformable(source: Source) -> DetectorConfig:
    """DAB-Deformable-DETR and DN-Deformable-DETR."""
    return FAMILIES["dab-deformable-detr"].replace(queries=_anchors(source))


def deformable(source: Source) -> DetectorConfig:
    """Deformable DETR: plain, refined or two-stage."""
    tensors = source.tensors
    if "transformer.enc_output.weight" in tensors:
        # Two-stage checkpoints do not tell how many proposals they take; 300 is the default.
        count = int(source.told.get("num_queries", 300))
        return FAMILIES["deformable-detr-two-stage"].replace(queries={"number": count})
    inner = "transformer.decoder.bbox_embed.0.layers.0.weight" in tensors
    refined = source.told.get("with_box_refine", inner)
    family = FAMILIES["deformable-detr-refine" if refined else "deformable-detr"]
    return family.replace(queries=_learned(source))


def hybrid(source: Source) -> DetectorConfig:
    """H-Deformable-DETR."""
    count = len(source.tensors["query_embed.weight"])
    own = int(source.told.get("num_queries_one2one", max(count - _ONE_TO_MANY, 0) or count))
    more = count - own
    further = OneToManyConfig(queries=more) if more else None
    return FAMILIES["h-deformable-detr"].replace(queries={"number": own, "one_to_many": further})


def dino(source: Source) -> DetectorConfig:
    """DINO."""
    shared = all(_alike(source.tensors, name) for name in ("class_embed", "bbox_embed"))
    number = {"number": len(source.tensors["transformer.tgt_embed.weight"])}
    learned = "label_enc.weight" in source.tensors
    return FAMILIES["dino-official"].replace(
        positions={"temperature": _temperature(source)},
        queries=number if learned else {**number, "denoising": None},
        encoder={"fusion": "dense" if _FUSION in source.tensors else None},
        decoder={"refinement": {"shared_heads": shared}},
    )


def mask_dino(source: Source) -> DetectorConfig:
    """Mask DINO; how many proposals it takes is not in the tensors, 300 is every config's."""
    backwards = bool(source.told["coarse_to_fine"])
    projection, joined = (source.tensors[f"{n}.weight"] for n in ("mask_features", "layer_1"))
    width = len(source.tensors["transformer.decoder.norm.weight"])
    channels = None if len(joined) == width else len(joined)
    return FAMILIES["mask-dino"].replace(
        queries={
            "number": int(source.told.get("num_queries", 300)),
            "coarse_to_fine": backwards,
            "initial_boxes": source.told["initial_boxes"],
        },
        heads={"masks": {"width": len(projection), "channels": channels}},
    )


def _learned(source: Source) -> dict[str, Any]:
    """Learned queries."""
    return {"number": len(source.tensors["query_embed.weight"])}


def _anchors(source: Source) -> dict[str, Any]:
    """What DAB-DETR's relatives share; a label embedding tells that they were denoising."""
    told = "label_enc.weight" in source.tensors
    return {
        "number": len(source.tensors["refpoint_embed.weight"]),
        "denoising": PlainDenoisingConfig() if told else None,
    }


def _temperature(source: Source) -> float:
    """Of the image positions; 20 in all repositories that have it as an option.

    Raises:
        UserError: ``weights-config`` where the axes differ.
    """
    height, width = (float(source.told.get(f"pe_temperature{axis}", 20)) for axis in "HW")
    if height != width:
        raise UserError(
            "weights-config", f"{source.place}: temperatures {height} and {width} differ"
        )
    return height


def _alike(tensors: Mapping[str, Tensor], name: str) -> bool:
    """Whether the heads of all layers are copies of the first."""
    first = {n: x for n, x in tensors.items() if n.startswith(f"{name}.0.")}
    depth = _depth(tensors, name)
    return all(
        torch.equal(x, tensors[n.replace(".0.", f".{i}.", 1)])
        for n, x in first.items()
        for i in range(1, depth)
    )


def _backbone(source: Source, deformable: bool) -> BackboneConfig:
    """The ResNet, Swin or ConvNeXt, from its tensors.

    Raises:
        UserError: ``weights-backbone`` for any other backbone.
    """
    tensors = source.tensors
    maps = 1
    if deformable:
        kernels = (tensors.get(f"input_proj.{i}.0.weight") for i in range(len(_STRIDES)))
        maps = sum(1 for x in kernels if x is not None and x.shape[-1] == 1)
    if (prefix := swin_prefix(tensors)) is not None:
        table = tensors[f"{prefix}layers.0.blocks.0.attn.relative_position_bias_table"]
        width = len(tensors[f"{prefix}patch_embed.proj.weight"])
        kind = (width, _depth(tensors, f"{prefix}layers.2.blocks"), (isqrt(len(table)) + 1) // 2)
        if kind not in _SWINS or source.told.get("dilation"):
            raise UserError(
                "weights-backbone",
                f"{source.place}: no Swin of width {kind[0]}, {kind[1]} blocks in its third stage "
                f"and window {kind[2]} is known, nor any dilated one",
            )
        return BackboneConfig(name=_SWINS[kind], strides=_STRIDES[-maps:], map_norm=True)
    if is_convnext(tensors):
        width = len(tensors[f"{CONVNEXT}downsample_layers.0.0.weight"])
        shape = (width, _depth(tensors, f"{CONVNEXT}stages.2"))
        if shape not in _CONVNEXTS:
            raise UserError(
                "weights-backbone",
                f"{source.place}: no ConvNeXt of width {width} and {shape[1]} blocks in its third "
                "stage is known",
            )
        return BackboneConfig(name=_CONVNEXTS[shape], strides=_STRIDES[-maps:], map_norm=True)
    body = "backbone.0.body."
    blocks = _depth(tensors, f"{body}layer3")
    convolutions = 3 if f"{body}layer1.0.conv3.weight" in tensors else 2
    name = _RESNETS.get((blocks, convolutions))
    if name is None:
        raise UserError(
            "weights-backbone",
            f"{source.place}: the backbone is no ResNet-18, 34, 50 or 101, no Swin and no ConvNeXt",
        )
    strides, options = _STRIDES[-maps:], {}
    if source.told.get("dilation"):
        strides, options = (*strides[:-1], 16), {"output_stride": 16}
    return BackboneConfig(name=name, strides=strides, norm="frozen", options=options)


def swin_prefix(tensors: Mapping[str, Tensor]) -> str | None:
    """What stands before the names of a Swin's tensors; ``None`` for other backbones."""
    for prefix in ("backbone.0.", "backbone.0.body."):
        if f"{prefix}patch_embed.proj.weight" in tensors:
            return prefix
    return None


def is_convnext(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the backbone is a ConvNeXt under its authors' names."""
    return f"{CONVNEXT}downsample_layers.0.0.weight" in tensors


def _depth(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """One more than the largest number after a prefix."""
    found = (re.match(rf"{re.escape(prefix)}\.(\d+)\.", name) for name in tensors)
    return max((int(m[1]) for m in found if m), default=-1) + 1
