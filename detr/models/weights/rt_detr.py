"""RT-DETR and RT-DETRv2 as the transformers library publishes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from detr.config import BackboneConfig, DetectorConfig
from detr.data.preprocess import PreprocessConfig
from detr.errors import UserError
from detr.models.weights.backbones import OURS
from detr.models.weights.deformable_detr import feed_forward_rules, self_attention_rules
from detr.models.weights.renaming import Rule
from detr.presets import FAMILIES

BACKBONE = r"model\.backbone\.model\."
# Trained on images of 8 bits divided by 255 and nothing else.
INPUT = PreprocessConfig(size=(640, 640), mean=(0.0, 0.0, 0.0), std=(255.0, 255.0, 255.0))
_WB = "(weight|bias)"
_NORM = "(weight|bias|running_mean|running_var)"
# timm's block counts and the ResNet-vd that has them.
_NAMES: dict[tuple[str, tuple[int, ...]], str] = {
    ("basic", (2, 2, 2, 2)): "resnet18d",
    ("basic", (3, 4, 6, 3)): "resnet34d",
    ("bottleneck", (3, 4, 6, 3)): "resnet50d",
    ("bottleneck", (3, 4, 23, 3)): "resnet101d",
}
# Options of config.json that would make another architecture, and what they are in ours.
_PLAIN: dict[str, Any] = {
    "encode_proj_layers": [2],
    "encoder_activation_function": "gelu",
    "activation_function": "silu",
    "decoder_activation_function": "relu",
    "normalize_before": False,
    "learn_initial_query": False,
    "with_box_refine": True,
    "num_feature_levels": 3,
    "feat_strides": [8, 16, 32],
    "layer_norm_eps": 1e-5,
    "batch_norm_eps": 1e-5,
    # Version 2 alone.
    "decoder_offset_scale": 0.5,
    "decoder_n_levels": 3,
}
# What DEIM has instead of ReLU; no config.json tells, only who reads its own files.
ACTIVATION = "mlp_activation"


def config_of(published: Mapping[str, Any], num_classes: int, place: str) -> DetectorConfig:
    """Our config of a published ``config.json``; see :mod:`deformable_detr`.

    Raises:
        UserError: ``weights-config`` for an option we have no architecture for.
    """
    check_options(published, _PLAIN, place)
    width = published.get("d_model", 256)
    inner = published.get("encoder_hidden_dim", 256)
    return FAMILIES["rtdetr"].replace(
        num_classes=num_classes,
        width=width,
        mlp_activation=published.get(ACTIVATION, "relu"),
        attention_heads=attention_heads(published, place),
        dropout=published.get("dropout", 0.0),
        backbone=_backbone(published),
        positions={"temperature": published.get("positional_encoding_temperature", 10000)},
        encoder={
            "layers": published.get("encoder_layers", 1),
            "ffn": published.get("encoder_ffn_dim", 1024),
            "width": None if inner == width else inner,
            "expansion": published.get("hidden_expansion", 1.0),
        },
        queries={
            "number": published.get("num_queries", 300),
            "position_layers": published.get("position_layers", 2),
        },
        decoder={
            "layers": published.get("decoder_layers", 6),
            "ffn": published.get("decoder_ffn_dim", 1024),
            "activation": published.get(ACTIVATION, "relu"),
            "cross_attention": {
                "points": published.get("decoder_n_points", 4),
                "discrete": samples_cells(published, place),
            },
        },
    )


def check_options(published: Mapping[str, Any], plain: Mapping[str, Any], place: str) -> None:
    """Raises UserError ``weights-config`` where an option is not what our architecture has."""
    for option, wanted in plain.items():
        found = published.get(option, wanted)
        if (list(found) if isinstance(found, tuple) else found) != wanted:
            raise UserError("weights-config", f"{place}: {option} {found} is not supported")


def samples_cells(published: Mapping[str, Any], place: str) -> bool:
    """Whether attention samples whole cells.

    Raises:
        UserError: ``weights-config`` for another way than the two.
    """
    methods = {"default": False, "discrete": True}
    method = published.get("decoder_method", "default")
    if method not in methods:
        raise UserError("weights-config", f"{place}: decoder_method {method} is not supported")
    return methods[method]


def attention_heads(published: Mapping[str, Any], place: str) -> int:
    """Heads of every attention.

    Raises:
        UserError: ``weights-config`` where encoder and decoder have different ones.
    """
    heads: int = published.get("encoder_attention_heads", 8)
    if published.get("decoder_attention_heads", 8) != heads:
        raise UserError(
            "weights-config", f"{place}: encoder and decoder have different attention heads"
        )
    return heads


def _backbone(published: Mapping[str, Any]) -> BackboneConfig:
    """The ResNet-vd; published ones keep the statistics that training froze."""
    inner = published.get("backbone_config") or {}
    kind = inner.get("layer_type", "bottleneck")
    widths = [int(w) for w in inner.get("hidden_sizes", (256, 512, 1024, 2048))]
    depths = tuple(int(d) for d in inner.get("depths", (3, 4, 6, 3)))
    stem = int(inner.get("embedding_size", 64))
    expansion = 4 if kind == "bottleneck" else 1
    channels = [w // expansion for w in widths]
    options: dict[str, Any] = {}
    if (kind, depths) not in _NAMES:
        options["layers"] = list(depths)
    if channels != [64, 128, 256, 512]:
        options["channels"] = channels
    if stem != 64:
        options["stem_width"] = stem // 2
    name = _NAMES.get((kind, depths), "resnet50d" if expansion == 4 else "resnet18d")
    frozen = published.get("freeze_backbone_batch_norms", True)
    return BackboneConfig(
        name=name,
        norm="frozen" if frozen else "train",
        options=options,
        first_projection=kind == "basic",
    )


def rules(config: DetectorConfig) -> tuple[Rule, ...]:
    """Where the tensors go, the backbone's too."""
    return (*detector_rules(), *_backbone_rules(config), *_convolution_rules())


def detector_rules() -> tuple[Rule, ...]:
    """What D-FINE has as well: all but the backbone and the fusing of maps."""
    encoder, decoder = (
        r"model\.encoder\.(?:aifi|encoder)\.0\.layers\.(\d+)\.",
        r"model\.decoder\.layers\.(\d+)\.",
    )
    return (
        Rule(r".*\.num_batches_tracked", None, "counts training steps"),
        Rule(r"model\.(?:anchors|valid_mask)", None, "follows from the canvas"),
        Rule(r"model\.encoder_input_proj\.(\d+)\.([01])\.(.+)", r"neck.projections.\1.\2.\3"),
        *self_attention_rules(encoder, "encoder", ""),
        *(
            Rule(rf"{encoder}{theirs}\.{_WB}", rf"encoder.layers.\1.ffn.{ours}.\2")
            for theirs, ours in (
                (r"(?:mlp\.)?fc1", "expand"),
                (r"(?:mlp\.)?fc2", "contract"),
                ("final_layer_norm", "norm"),
            )
        ),
        *_projection_rules(),
        *self_attention_rules(decoder, "decoder", "self_"),
        *feed_forward_rules("decoder"),
        Rule(rf"{decoder}encoder_attn\.n(?:um)?_points_scale", None, "follows from the points"),
        Rule(rf"{decoder}encoder_attn\.(\w+)\.{_WB}", r"decoder.layers.\1.cross_attention.\2.\3"),
        Rule(rf"{decoder}encoder_attn_layer_norm\.{_WB}", r"decoder.layers.\1.cross_norm.\2"),
        Rule(r"model\.denoising_class_embed\.weight", "denoiser.label_embedding.weight"),
        Rule(rf"model\.enc_output\.0\.{_WB}", r"source.proposals.project.\1"),
        Rule(rf"model\.enc_output\.1\.{_WB}", r"source.proposals.norm.\1"),
        Rule(rf"model\.enc_score_head\.{_WB}", r"source.proposals.class_head.\1"),
        Rule(r"model\.enc_bbox_head\.(.+)", r"source.proposals.box_head.\1"),
        Rule(r"model\.decoder\.query_pos_head\.(.+)", r"source.position_mlp.\1"),
        Rule(rf"(?:model\.decoder\.)?class_embed\.(\d+)\.{_WB}", r"decoder.class_heads.\1.\2"),
        Rule(r"(?:model\.decoder\.)?bbox_embed\.(\d+)\.(.+)", r"decoder.box_heads.\1.\2"),
    )


def _projection_rules() -> list[Rule]:
    """What coarser maps and the encoder's output go through."""
    return [
        Rule(r"model\.decoder_input_proj\.(\d+)\.0\.weight", r"encoder.projections.\1.conv.weight"),
        Rule(rf"model\.decoder_input_proj\.(\d+)\.1\.{_NORM}", r"encoder.projections.\1.norm.\2"),
        Rule(r"model\.encoder\.lateral_convs\.(.+)", r"encoder.lateral.\1"),
    ]


def _convolution_rules() -> list[Rule]:
    """The two paths across scales."""
    found = [Rule(r"model\.encoder\.downsample_convs\.(.+)", r"encoder.downsample.\1")]
    for theirs, ours in (("fpn_blocks", "top_down"), ("pan_blocks", "bottom_up")):
        block, place = rf"model\.encoder\.{theirs}\.(\d+)\.", rf"encoder.{ours}.\1."
        for conv, name in (("conv1", "way"), ("conv2", "shortcut"), ("conv3", "output")):
            found.append(Rule(rf"{block}{conv}\.(.+)", rf"{place}{name}.\2"))
        for conv, name in (("conv1", "large"), ("conv2", "small")):
            found.append(
                Rule(rf"{block}bottlenecks\.(\d+)\.{conv}\.(.+)", rf"{place}blocks.\2.{name}.\3")
            )
    return found


def _backbone_rules(config: DetectorConfig) -> list[Rule]:
    """ResNet-vd; timm's stem is one sequence whose last norm stands beside it."""
    found = []
    for conv, norm in ((0, "conv1.1"), (1, "conv1.4"), (2, "bn1")):
        stem = rf"{BACKBONE}embedder\.embedder\.{conv}\."
        found += [
            Rule(rf"{stem}convolution\.weight", f"{OURS}conv1.{3 * conv}.weight"),
            Rule(rf"{stem}normalization\.{_NORM}", rf"{OURS}{norm}.\1"),
        ]
    for stage in range(4):
        block = rf"{BACKBONE}encoder\.stages\.{stage}\.layers\.(\d+)\."
        ours = rf"{OURS}layer{stage + 1}.\1."
        short = rf"{block}shortcut\.(?:1\.)?"
        found += [
            Rule(rf"{short}convolution\.weight", ours + "downsample.1.weight"),
            Rule(rf"{short}normalization\.{_NORM}", ours + r"downsample.2.\2"),
        ]
        for conv in range(3):
            source = rf"{block}layer\.{conv}\."
            found += [
                Rule(rf"{source}convolution\.weight", f"{ours}conv{conv + 1}.weight"),
                Rule(rf"{source}normalization\.{_NORM}", rf"{ours}bn{conv + 1}.\2"),
            ]
    return found
