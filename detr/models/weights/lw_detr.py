"""LW-DETR as the transformers library publishes it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from detr.config import AnyVitConfig, DetectorConfig, VitBackboneConfig
from detr.data.preprocess import PreprocessConfig
from detr.errors import UserError
from detr.models.weights.deformable_detr import self_attention_rules
from detr.models.weights.renaming import Rule
from detr.models.weights.rt_detr import check_options
from detr.presets import FAMILIES

# ImageNet's mean and deviation, as everywhere.
INPUT = PreprocessConfig(size=(640, 640))
_WB = "(weight|bias)"
_NORM = "(weight|bias|running_mean|running_var)"
_VIT = "model.backbone.backbone."
_BLOCKS = r"model\.backbone\.backbone\.encoder\.layer\."
_POSITIONS = f"{_VIT}embeddings.position_embeddings"
_STEPS = r"model\.reference_point_embed\.weight"
_CONTENTS = r"model\.query_feat\.weight"
_PRETRAINED = "pretrain_image_size"
# Options of config.json that would make another architecture, and what they are in ours.
_PLAIN: dict[str, Any] = {
    "activation_function": "silu",
    "decoder_activation_function": "relu",
    "batch_norm_eps": 1e-5,
    "attention_bias": True,
}
_PLAIN_VIT: dict[str, Any] = {
    "mlp_ratio": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "num_channels": 3,
    "qkv_bias": True,
    "use_absolute_position_embeddings": True,
    "dropout_prob": 0.0,
}


def config_of(published: Mapping[str, Any], num_classes: int, place: str) -> DetectorConfig:
    """Our config of a published ``config.json``; see :mod:`deformable_detr`.

    Raises:
        UserError: ``weights-config`` for an option we have no architecture for.
    """
    check_options(published, _PLAIN, place)
    scales = tuple(float(x) for x in published.get("projector_scale_factors", ()))
    if not scales or list(scales) != sorted(set(scales) & {2.0, 1.0, 0.5}, reverse=True):
        raise UserError(
            "weights-config", f"{place}: projector_scale_factors {list(scales)} is not supported"
        )
    return detector_config(published, num_classes).replace(
        backbone=_backbone(published, place),
        neck={
            "kind": "projector",
            "scales": scales,
            "blocks": published.get("c2f_num_blocks", 3),
            "expansion": published.get("hidden_expansion", 0.5),
        },
    )


def detector_config(published: Mapping[str, Any], num_classes: int) -> DetectorConfig:
    """What RF-DETR has as well: all but backbone and neck."""
    return FAMILIES["lwdetr"].replace(
        num_classes=num_classes,
        width=published.get("d_model", 256),
        attention_heads=published.get("decoder_self_attention_heads", 8),
        dropout=published.get("dropout", 0.0),
        queries={
            "number": published.get("num_queries", 300),
            "groups": published.get("group_detr", 13),
        },
        decoder={
            "layers": published.get("decoder_layers", 3),
            "ffn": published.get("decoder_ffn_dim", 2048),
            "cross_attention": {
                "points": published.get("decoder_n_points", 4),
                "heads": published.get("decoder_cross_attention_heads", 16),
            },
        },
    )


def _backbone(published: Mapping[str, Any], place: str) -> VitBackboneConfig:
    """The ViT."""
    inner = published.get("backbone_config") or {}
    kind = inner.get("model_type", "lw_detr_vit")
    if kind != "lw_detr_vit":
        raise UserError("weights-backbone", f"{place}: the backbone is a {kind}, not a lw_detr_vit")
    check_options(inner, _PLAIN_VIT, place)
    patch, size = inner.get("patch_size", 16), inner.get(_PRETRAINED, 224)
    if not (isinstance(patch, int) and isinstance(size, int)):
        raise UserError("weights-config", f"{place}: {_PRETRAINED} {size} of patches {patch}")
    taps = taps_of(inner, place)
    return VitBackboneConfig(
        patch=patch,
        width=inner.get("hidden_size", 768),
        heads=inner.get("num_attention_heads", 12),
        side=size // patch,
        windows=math.isqrt(inner.get("num_windows", 16)),
        windowed=tuple(i for i in sorted(inner.get("window_block_indices", ())) if i < taps[-1]),
        taps=taps,
    )


def taps_of(inner: Mapping[str, Any], place: str) -> tuple[int, ...]:
    """After how many blocks the library takes a map, each.

    Raises:
        UserError: ``weights-config`` where it takes none or the tokens before the first block.
    """
    depth = inner.get("num_hidden_layers", 12)
    features = inner.get("out_features") or []
    indices = inner.get("out_indices")
    if indices is None:
        names = ["stem", *(f"stage{i}" for i in range(1, depth + 1))]
        indices = [names.index(name) for name in features if name in names] or [depth]
    taps = tuple(sorted(int(i) % (depth + 1) for i in indices))
    if taps[0] < 1:
        raise UserError("weights-config", f"{place}: out_indices {list(indices)} is not supported")
    return taps


def adapt(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Fills the keys' bias, which is none, takes groups apart, lays out the positions, in place."""
    take_groups_apart(tensors)
    for name in [n for n in tensors if n.startswith(_VIT) and n.endswith("q_proj.bias")]:
        key = name.replace("q_proj", "k_proj")
        tensors.setdefault(key, torch.zeros_like(tensors[name]))
    if _POSITIONS not in tensors:
        return {}
    tensors[_POSITIONS] = grid_of(tensors[_POSITIONS])
    return {f"{_POSITIONS}[:, 0]": "of a class token, which the detector does not have"}


def take_groups_apart(tensors: dict[str, Tensor]) -> None:
    """Tables of all groups as one table of each, ``NAME.weight.0`` and so on, in place."""
    groups = sum(re.fullmatch(r"model\.enc_output\.\d+\.bias", n) is not None for n in tensors)
    for name in ("model.reference_point_embed.weight", "model.query_feat.weight"):
        if name in tensors and groups:
            parts = tensors.pop(name).chunk(groups)
            tensors.update({f"{name}.{i}": part for i, part in enumerate(parts)})


def grid_of(positions: Tensor) -> Tensor:
    """Published positions ``[1, 1 + side * side, C]``, a class token's first, as a grid."""
    side = math.isqrt(positions.shape[1] - 1)
    return positions[0, 1 : 1 + side * side].reshape(side, side, -1)


def rules(config: DetectorConfig) -> tuple[Rule, ...]:
    """Where the tensors go, the backbone's too."""
    return (
        *unused_block_rules(rf"{_BLOCKS}(\d+)\.", config),
        *detector_rules(config),
        *neck_rules(),
        *_backbone_rules(),
    )


def unused_block_rules(block: str, config: DetectorConfig) -> list[Rule]:
    """Blocks of a vision transformer after the last map.

    Args:
        block: Regular expression of a published block's name.
        config: The detector.
    """
    backbone = config.backbone
    if not isinstance(backbone, AnyVitConfig):
        return []
    numbers = "|".join(map(str, range(backbone.depth)))
    later = block.replace(r"(\d+)", rf"(?!(?:{numbers})\.)\d+")
    return [Rule(rf"{later}.+", None, "of a block after the last map")]


def detector_rules(config: DetectorConfig) -> tuple[Rule, ...]:
    """What RF-DETR has as well: all but backbone and neck."""
    layer = r"model\.decoder\.layers\.(\d+)\."
    ours = r"decoder.layers.\1."
    table = [
        Rule(r".*\.num_batches_tracked", None, "counts training steps"),
        *self_attention_rules(layer, "decoder", "self_"),
        Rule(rf"{layer}cross_attn\.(\w+)\.{_WB}", ours + r"cross_attention.\2.\3"),
        Rule(rf"{layer}cross_attn_layer_norm\.{_WB}", ours + r"cross_norm.\2"),
        Rule(rf"{layer}mlp\.fc1\.{_WB}", ours + r"ffn.expand.\2"),
        Rule(rf"{layer}mlp\.fc2\.{_WB}", ours + r"ffn.contract.\2"),
        Rule(rf"{layer}layer_norm\.{_WB}", ours + r"ffn.norm.\2"),
        Rule(rf"model\.decoder\.layernorm\.{_WB}", r"decoder.norm.\1"),
        Rule(r"model\.decoder\.ref_point_head\.(.+)", r"source.reference_mlp.\1"),
        Rule(rf"class_embed\.{_WB}", r"decoder.class_heads.0.\1"),
        Rule(r"bbox_embed\.(.+)", r"decoder.box_heads.0.\1"),
    ]
    groups = getattr(config.queries, "groups", 1)
    for group in range(groups):
        owner = f"source.further.{group - 1}" if group else "source"
        head = f"{owner}.proposals"
        table += [
            Rule(rf"{_STEPS}\.{group}", f"{owner}.steps.weight"),
            Rule(rf"{_CONTENTS}\.{group}", f"{owner}.content.weight"),
            Rule(rf"model\.enc_output\.{group}\.{_WB}", rf"{head}.project.\1"),
            Rule(rf"model\.enc_output_norm\.{group}\.{_WB}", rf"{head}.norm.\1"),
            Rule(rf"model\.enc_out_class_embed\.{group}\.{_WB}", rf"{head}.class_head.\1"),
            Rule(rf"model\.enc_out_bbox_embed\.{group}\.(.+)", rf"{head}.box_head.\1"),
        ]
    return tuple(table)


def c2f_rules(layer: str, level: str) -> list[Rule]:
    """A C2f block and the norm after it.

    Args:
        layer: Regular expression of the published level's name.
        level: Ours, with the groups of it.
    """
    after = level.count("\\") + 1
    block = rf"{layer}projector_layer\."
    way = rf"{level}.0.ways.\{after}."
    return [
        Rule(rf"{block}conv1\.(.+)", rf"{level}.0.first.\{after}"),
        Rule(rf"{block}conv2\.(.+)", rf"{level}.0.last.\{after}"),
        Rule(rf"{block}bottlenecks\.(\d+)\.conv1\.(.+)", rf"{way}0.\{after + 1}"),
        Rule(rf"{block}bottlenecks\.(\d+)\.conv2\.(.+)", rf"{way}1.\{after + 1}"),
        Rule(rf"{layer}layer_norm\.{_WB}", rf"{level}.1.\{after}"),
    ]


def neck_rules() -> list[Rule]:
    """The projector, of levels that are numbered."""
    layer = r"model\.backbone\.projector\.scale_layers\.(\d+)\."
    sampling = rf"{layer}sampling_layers\.(\d+)\.layers\."
    ours = r"neck.resample.\1.\2."
    return [
        Rule(rf"{sampling}0\.conv\.weight", ours + "0.conv.weight"),
        Rule(rf"{sampling}0\.norm\.{_NORM}", ours + r"0.norm.\3"),
        Rule(rf"{sampling}0\.{_WB}", ours + r"0.\3"),
        Rule(rf"{sampling}1\.{_WB}", ours + r"2.\3"),
        *c2f_rules(layer, r"neck.levels.\1"),
    ]


def _backbone_rules() -> list[Rule]:
    """The ViT."""
    vit = _VIT.replace(".", r"\.")
    block = rf"{_BLOCKS}(\d+)\."
    ours = r"backbone.blocks.\1."
    return [
        Rule(rf"{vit}embeddings\.projection\.{_WB}", r"backbone.embed.\1"),
        Rule(_POSITIONS.replace(".", r"\."), "backbone.positions"),
        *attention_rules(block, ours),
        Rule(rf"{block}layernorm_before\.{_WB}", ours + r"norm.\2"),
        Rule(rf"{block}layernorm_after\.{_WB}", ours + r"ffn_norm.\2"),
        Rule(rf"{block}intermediate\.fc1\.{_WB}", ours + r"expand.\2"),
        Rule(rf"{block}intermediate\.fc2\.{_WB}", ours + r"contract.\2"),
        Rule(rf"{block}gamma_1", ours + "scale"),
        Rule(rf"{block}gamma_2", ours + "ffn_scale"),
    ]


def attention_rules(block: str, ours: str) -> list[Rule]:
    """Attention of a vision transformer's block.

    Args:
        block: Regular expression of the published block's name.
        ours: What our block's name starts with.
    """
    return [
        *(
            Rule(rf"{block}attention\.{letter}_proj\.{_WB}", rf"{ours}query_key_value.\2#{part}")
            for part, letter in enumerate("qkv")
        ),
        Rule(rf"{block}attention\.o_proj\.{_WB}", ours + r"output.\2"),
    ]
