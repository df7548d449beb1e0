"""DEIMv2 as the transformers library publishes it, read as the network of the original repository.

The library's port (5.23) computes otherwise than what its weights were trained as: a norm of tokens
before they are judged, positions made anew in every layer, ReLU in the heads; over DINOv3 also a
norm of the last map, GELU for SiLU, and no bias of keys, in those sizes that have it otherwise.
Converted files have an identity in the norm's place; one in which it was trained is another network
and refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from detr.config import BackboneConfig, DetectorConfig, Dinov3BackboneConfig
from detr.data.preprocess import PreprocessConfig
from detr.errors import UserError
from detr.models.weights import d_fine, dinov3, lw_detr, rt_detr
from detr.models.weights.renaming import Rule
from detr.presets import FAMILIES

_WB = "(weight|bias)"
_NORM = "(weight|bias|running_mean|running_var)"
# Options of config.json that would make another architecture, and what they are in ours.
_PLAIN: dict[str, Any] = {
    "encoder_activation_function": "gelu",
    "activation_function": "silu",
    "decoder_activation_function": "silu",
    "normalize_before": False,
    "learn_initial_query": False,
    "with_box_refine": True,
    "layer_norm_eps": 1e-5,
    "batch_norm_eps": 1e-5,
    "decoder_offset_scale": 0.5,
    "layer_scale": 1,
    "lqe_layers": 2,
    "encoder_fuse_op": "sum",
}
# HGNetv2s of three stages, by blocks and channels of the last.
_SMALL = {
    (1, 256): "hgnetv2_atto",
    (1, 512): "hgnetv2_femto",
    (2, 512): "hgnetv2_b0",
}
# What the library has before the judging of tokens, and the original has not.
_ADDED = ("model.enc_output.0.weight", "model.enc_output.0.bias", "model.enc_output.1.weight")
_ADDED_BIAS = "model.enc_output.1.bias"
_UNCHANGED = "untrained, of a norm that only the transformers library has"
_CONVOLUTIONS = re.compile(r"model\.conv_encoder\.(?:model|encoder_input_proj)\.")
_SPLIT = re.compile(r"(model\.encoder\..+\.csp_rep[12]\.)conv1\.((?:conv|norm)\..+)")


def config_of(published: Mapping[str, Any], num_classes: int, place: str) -> DetectorConfig:
    """Our config of a published ``config.json``; see :mod:`deformable_detr`.

    Raises:
        UserError: ``weights-config`` for an option we have no architecture for,
            ``weights-backbone`` for another backbone than an HGNetv2 or a DINOv3.
    """
    strides = tuple(int(stride) for stride in published.get("feat_strides", (8, 16, 32)))
    kinds = {"hybrid": "gelan", "lite": "lite"}
    kind = published.get("encoder_type", "hybrid")
    if kind not in kinds:
        raise UserError("weights-config", f"{place}: encoder_type {kind} is not supported")
    lite = kind == "lite"
    layers = published.get("decoder_layers", 6)
    wanted = {
        **_PLAIN,
        "num_feature_levels": len(strides) + lite,
        "eval_idx": layers - 1 if published.get("eval_idx") == layers - 1 else -1,
    }
    if not lite:
        wanted["encode_proj_layers"] = [len(strides) - 1]
    rt_detr.check_options(published, wanted, place)
    sizes = d_fine.sizes(published, place)
    encoder = {
        **sizes.pop("encoder"),
        "kind": kinds[kind],
        "join": "sum",
        "smooth": published.get("encoder_has_trailing_conv", True),
        **({"layers": 0} if lite else {}),
    }
    base = FAMILIES["deimv2"].replace(
        num_classes=num_classes,
        backbone=_backbone(published, strides, place),
        neck={"levels": len(strides) + lite, "pooled": lite},
        encoder=encoder,
        **sizes,
    )
    return base.replace(
        decoder={
            "ffn": published.get("decoder_ffn_dim", 1024) // 2,
            "gated": published.get("use_gateway", True),
            "refinement": {"shared_boxes": published.get("share_bbox_head", False)},
        }
    )


def _backbone(
    published: Mapping[str, Any], strides: tuple[int, ...], place: str
) -> BackboneConfig | Dinov3BackboneConfig:
    """The DINOv3, or the HGNetv2, of three stages in the smallest."""
    inner = published.get("backbone_config") or {}
    blocks = [int(n) for n in inner.get("stage_num_blocks", ())]
    if inner.get("model_type") == "dinov3_vit":
        return dinov3.config_of(published, place)
    if inner.get("model_type") != "hgnet_v2" or len(blocks) != 3:
        return d_fine.backbone_of(published, strides, place)
    name = _SMALL.get((blocks[2], int(inner["stage_out_channels"][2])))
    if name is None or not inner.get("use_learnable_affine_block", False):
        raise UserError(
            "weights-backbone", f"{place}: the backbone is no HGNetv2 of three stages we know"
        )
    frozen = published.get("freeze_backbone_batch_norms", True)
    return BackboneConfig(name=name, strides=strides, norm="frozen" if frozen else "train")


def adapt(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Puts the backbone under D-FINE's names and takes doubled convolutions apart, in place."""
    dinov3.adapt(tensors)
    for name in list(tensors):
        if _CONVOLUTIONS.match(name):
            tensors[_as_d_fine(name)] = tensors.pop(name)
        elif (found := _SPLIT.fullmatch(name)) and not name.endswith("num_batches_tracked"):
            shortcut, way = tensors.pop(name).chunk(2)
            tensors[f"{found[1]}shortcut.{found[2]}"] = shortcut
            tensors[f"{found[1]}way.{found[2]}"] = way
    return {}


def _as_d_fine(name: str) -> str:
    """A backbone's tensor as D-FINE's is called."""
    for theirs, ours in (
        (r"model\.", "model.backbone.model."),
        (r"encoder_input_proj\.(\d+)\.conv\.", r"model.encoder_input_proj.\1.0."),
        (r"encoder_input_proj\.(\d+)\.norm\.", r"model.encoder_input_proj.\1.1."),
    ):
        name = re.sub(rf"^model\.conv_encoder\.{theirs}", ours, name)
    return name


def check(config: DetectorConfig, tensors: Mapping[str, Tensor], place: str) -> None:
    """Raises UserError ``weights-config`` where config and weights differ, or the network is other.

    What the original has not must be as the library's conversion left it.
    """
    d_fine.check(config, tensors, place)
    width = config.width
    left = (torch.eye(width), torch.zeros(width), torch.ones(width), torch.zeros(width))
    for name, wanted in zip((*_ADDED, _ADDED_BIAS), left, strict=True):
        found = tensors.get(name)
        if found is not None and not torch.equal(found.float().cpu(), wanted):
            raise UserError(
                "weights-config",
                f"{place}: {name} was trained; the original DEIMv2 has no such norm. As a teacher "
                "it is itself: teacher: hf:FOLDER",
            )


def input_of(config: DetectorConfig) -> PreprocessConfig:
    """What images went through: over a DINOv3, they are normalized as there."""
    return lw_detr.INPUT if isinstance(config.backbone, Dinov3BackboneConfig) else rt_detr.INPUT


def license_note(config: DetectorConfig) -> str:
    """What is to be known of a detector's license; empty where it is Apache 2.0."""
    if not isinstance(config.backbone, Dinov3BackboneConfig):
        return ""
    return (
        "license: the backbone comes from Meta's DINOv3, or was distilled from it; its weights are "
        "under the DINOv3 License, which binds whoever uses or passes them on"
    )


def rules(config: DetectorConfig) -> tuple[Rule, ...]:
    """Where the tensors go, the backbone's too."""
    layer = r"model\.decoder\.layers\.(\d+)\."
    edges = config.decoder.refinement.distribution
    shared = edges is not None and edges.shared_boxes
    heads = [
        Rule(r"(?:model\.decoder\.)?bbox_embed\.\d+\.(.+)", r"decoder.box_heads.0.\1"),
    ]
    return (
        Rule(r".*\.num_batches_tracked", None, "counts training steps"),
        *(Rule(re.escape(name), None, _UNCHANGED) for name in (*_ADDED, _ADDED_BIAS)),
        *(heads if shared else []),
        Rule(rf"{layer}mlp\.gate_proj\.{_WB}", r"decoder.layers.\1.ffn.expand.\2#0"),
        Rule(rf"{layer}mlp\.up_proj\.{_WB}", r"decoder.layers.\1.ffn.expand.\2#1"),
        Rule(rf"{layer}mlp\.down_proj\.{_WB}", r"decoder.layers.\1.ffn.contract.\2"),
        *_block_rules(r"fpn_blocks\.(\d+)", r"top_down.\1", 1),
        *_block_rules(r"pan_blocks\.(\d+)", r"bottom_up.\1", 1),
        *_block_rules("fpn_block", "top_down.0", 0),
        *_block_rules("pan_block", "bottom_up.0", 0),
        *_lite_rules(),
        *dinov3.rules(config),
        *d_fine.rules(config),
    )


def _block_rules(theirs: str, ours: str, groups: int) -> list[Rule]:
    """A GELAN block.

    Args:
        theirs: Regular expression of the library's block.
        ours: Ours, in terms of its groups.
        groups: Their number.
    """
    block, place = rf"model\.encoder\.{theirs}\.", f"encoder.{ours}."
    first, second = (rf"\{groups + i}" for i in (1, 2))
    found = [
        Rule(rf"{block}conv1\.(.+)", f"{place}first.{first}"),
        Rule(rf"{block}conv2\.(.+)", f"{place}last.{first}"),
    ]
    for way in range(2):
        inner, here = rf"{block}csp_rep{way + 1}\.", f"{place}ways.{way}."
        found += [
            Rule(rf"{inner}(shortcut|way)\.(.+)", f"{here}0.{first}.{second}"),
            Rule(rf"{inner}conv2\.(.+)", f"{here}1.{first}"),
        ]
        for conv, name in (("conv1", "large"), ("conv2", "small")):
            found.append(
                Rule(
                    rf"{inner}bottlenecks\.(\d+)\.{conv}\.(.+)",
                    f"{here}0.blocks.{first}.{name}.{second}",
                )
            )
    return found


def _lite_rules() -> list[Rule]:
    """The smallest sizes' steps between two maps."""
    projection = r"model\.encoder\.input_proj\.(\d+)\."
    return [
        Rule(rf"{projection}conv\.weight", r"neck.projections.\1.0.weight"),
        Rule(rf"{projection}norm\.{_NORM}", r"neck.projections.\1.1.\2"),
        Rule(r"model\.encoder\.down_conv1\.(.+)", r"neck.pooled.0.1.\1"),
        Rule(r"model\.encoder\.down_conv2\.(.+)", r"encoder.downsample.0.1.\1"),
        Rule(r"model\.encoder\.bi_fusion_conv\.(.+)", r"encoder.lateral.0.\1"),
    ]
