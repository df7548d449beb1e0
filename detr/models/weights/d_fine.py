"""D-FINE as the transformers library publishes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from detr.config import BackboneConfig, DetectorConfig
from detr.errors import UserError
from detr.models.weights import rt_detr
from detr.models.weights.backbones import OURS
from detr.models.weights.renaming import Rule
from detr.points import joined_points
from detr.presets import FAMILIES

INPUT = rt_detr.INPUT
_WB = "(weight|bias)"
_NORM = "(weight|bias|running_mean|running_var)"
# Channels within the stages of an HGNetv2, their blocks, convolutions of a block, and timm's name.
_NAMES: dict[tuple[tuple[int, ...], tuple[int, ...], int], str] = {
    ((16, 32, 64, 128), (1, 1, 2, 1), 3): "hgnetv2_b0",
    ((32, 48, 96, 192), (1, 1, 2, 1), 3): "hgnetv2_b1",
    ((32, 64, 128, 256), (1, 1, 3, 1), 4): "hgnetv2_b2",
    ((32, 64, 128, 256), (1, 1, 3, 1), 5): "hgnetv2_b3",
    ((48, 96, 192, 384), (1, 1, 3, 1), 6): "hgnetv2_b4",
    ((64, 128, 256, 512), (1, 2, 5, 2), 6): "hgnetv2_b5",
    ((96, 192, 384, 768), (2, 3, 6, 3), 6): "hgnetv2_b6",
}
# Those whose activations are followed by a learned scale and shift.
_AFFINE = {"hgnetv2_b0", "hgnetv2_b1", "hgnetv2_b2", "hgnetv2_b3"}
# Options of config.json that would make another architecture, and what they are in ours.
_PLAIN: dict[str, Any] = {
    "encoder_activation_function": "gelu",
    "activation_function": "silu",
    "decoder_activation_function": "relu",
    "normalize_before": False,
    "learn_initial_query": False,
    "with_box_refine": True,
    "layer_norm_eps": 1e-5,
    "batch_norm_eps": 1e-5,
    "decoder_offset_scale": 0.5,
    "layer_scale": 1,
    "lqe_layers": 2,
}


def config_of(published: Mapping[str, Any], num_classes: int, place: str) -> DetectorConfig:
    """Our config of a published ``config.json``; see :mod:`deformable_detr`.

    Raises:
        UserError: ``weights-config`` for an option we have no architecture for,
            ``weights-backbone`` for another backbone than an HGNetv2.
    """
    strides = [int(stride) for stride in published.get("feat_strides", (8, 16, 32))]
    layers = published.get("decoder_layers", 6)
    wanted = {
        **_PLAIN,
        "num_feature_levels": len(strides),
        "encode_proj_layers": [len(strides) - 1],
        "eval_idx": layers - 1 if published.get("eval_idx") == layers - 1 else -1,
    }
    rt_detr.check_options(published, wanted, place)
    activation = published.get(rt_detr.ACTIVATION, "relu")
    return FAMILIES["d-fine"].replace(
        num_classes=num_classes,
        mlp_activation=activation,
        backbone=backbone_of(published, tuple(strides), place),
        neck={"levels": len(strides)},
        **{"decoder.activation": activation},
        **sizes(published, place),
    )


def sizes(published: Mapping[str, Any], place: str) -> dict[str, Any]:
    """What a ``config.json`` of this kind changes of its family, besides backbone and levels.

    Raises:
        UserError: ``weights-config`` for an option we have no architecture for.
    """
    points = published.get("decoder_n_points", 4)
    width = published.get("d_model", 256)
    inner = published.get("encoder_hidden_dim", 256)
    return {
        "width": width,
        "attention_heads": rt_detr.attention_heads(published, place),
        "dropout": published.get("dropout", 0.0),
        "positions": {"temperature": published.get("positional_encoding_temperature", 10000)},
        "encoder": {
            "layers": published.get("encoder_layers", 1),
            "ffn": published.get("encoder_ffn_dim", 1024),
            "width": None if inner == width else inner,
            "expansion": published.get("hidden_expansion", 1.0),
            "blocks": round(3 * published.get("depth_mult", 1.0)),
        },
        "queries": {"number": published.get("num_queries", 300)},
        "decoder": {
            "layers": published.get("decoder_layers", 6),
            "ffn": published.get("decoder_ffn_dim", 1024),
            "cross_attention": {
                "points": points if isinstance(points, int) else joined_points(points),
                "discrete": rt_detr.samples_cells(published, place),
            },
            "refinement": {
                "bins": published.get("max_num_bins", 32),
                "reach": published.get("up", 0.5),
                "curvature": published.get("reg_scale", 4.0),
                "quality": {
                    "top": published.get("top_prob_values", 4),
                    "width": published.get("lqe_hidden_dim", 64),
                },
            },
        },
    }


def backbone_of(
    published: Mapping[str, Any], strides: tuple[int, ...], place: str
) -> BackboneConfig:
    """The HGNetv2; published ones keep the statistics that training froze.

    Raises:
        UserError: ``weights-backbone`` for another.
    """
    inner = published.get("backbone_config") or {}
    channels = tuple(int(n) for n in inner.get("stage_mid_channels", (48, 96, 192, 384)))
    blocks = tuple(int(n) for n in inner.get("stage_num_blocks", (1, 1, 3, 1)))
    depths = {int(n) for n in inner.get("stage_numb_of_layers", (6, 6, 6, 6))}
    name = _NAMES.get((channels, blocks, max(depths))) if len(depths) == 1 else None
    affine = bool(inner.get("use_learnable_affine_block", False))
    kind = inner.get("model_type", "hgnet_v2")
    if kind != "hgnet_v2" or name is None or affine != (name in _AFFINE):
        raise UserError(
            "weights-backbone", f"{place}: the backbone is none of timm's hgnetv2_b0 to hgnetv2_b6"
        )
    frozen = published.get("freeze_backbone_batch_norms", True)
    return BackboneConfig(name=name, strides=strides, norm="frozen" if frozen else "train")


def check(config: DetectorConfig, tensors: Mapping[str, Tensor], place: str) -> None:
    """Raises UserError ``weights-config`` where the places of edges are not those of the config."""
    refinement = config.decoder.refinement.distribution
    assert refinement is not None
    told = {"up": refinement.reach, "reg_scale": refinement.curvature}
    for name, wanted in told.items():
        found = tensors.get(f"model.decoder.{name}")
        if found is not None and abs(float(found) - wanted) > 1e-6:
            raise UserError(
                "weights-config",
                f"{place}: config.json says {name} {wanted:g} and the weights {float(found):g}",
            )


def rules(config: DetectorConfig) -> tuple[Rule, ...]:
    """Where the tensors go, the backbone's too."""
    decoder = r"model\.decoder\.layers\.(\d+)\."
    return (
        Rule(r"model\.decoder\.(?:decoder\.)?(?:up|reg_scale)", None, "the config says it"),
        *_backbone_rules(),
        *(
            Rule(
                rf"model\.{theirs}\.layers\.(\d+)\.mlp\.layers\.{i}\.{_WB}",
                rf"{ours}.layers.\1.ffn.{name}.\2",
            )
            for theirs, ours in ((r"encoder\.aifi\.0", "encoder"), ("decoder", "decoder"))
            for i, name in enumerate(("expand", "contract"))
        ),
        Rule(rf"{decoder}gateway\.gate\.{_WB}", r"decoder.layers.\1.gate.weigh.\2"),
        Rule(rf"{decoder}gateway\.norm\.{_WB}", r"decoder.layers.\1.gate.norm.\2"),
        *_fusion_rules(),
        Rule(r"model\.decoder\.pre_bbox_head\.(.+)", r"decoder.refiner.initial.\1"),
        Rule(
            r"model\.decoder\.lqe_layers\.(\d+)\.reg_conf\.(.+)",
            r"decoder.refiner.qualities.\1.score.\2",
        ),
        *rt_detr.detector_rules(),
    )


def _fusion_rules() -> list[Rule]:
    """GELAN blocks, and the steps between scales."""
    found = []
    csp = (("conv1", "way"), ("conv2", "shortcut"), ("conv3", "output"))
    for theirs, ours in (("fpn_blocks", "top_down"), ("pan_blocks", "bottom_up")):
        block, place = rf"model\.encoder\.{theirs}\.(\d+)\.", rf"encoder.{ours}.\1."
        for conv, name in (
            ("conv1", "first"), ("conv2", "ways.0.1"), ("conv3", "ways.1.1"), ("conv4", "last")
        ):  # fmt: skip
            found.append(Rule(rf"{block}{conv}\.(.+)", rf"{place}{name}.\2"))
        for way in range(2):
            inner, here = rf"{block}csp_rep{way + 1}\.", rf"{place}ways.{way}.0."
            for conv, name in csp:
                found.append(Rule(rf"{inner}{conv}\.(.+)", rf"{here}{name}.\2"))
            for conv, name in (("conv1", "large"), ("conv2", "small")):
                found.append(
                    Rule(rf"{inner}bottlenecks\.(\d+)\.{conv}\.(.+)", rf"{here}blocks.\2.{name}.\3")
                )
    for i in range(2):
        found.append(
            Rule(
                rf"model\.encoder\.downsample_convs\.(\d+)\.conv{i + 1}\.(.+)",
                rf"encoder.downsample.\1.{i}.\2",
            )
        )
    return found


def _backbone_rules() -> list[Rule]:
    """HGNetv2; timm has the same modules."""
    body = rt_detr.BACKBONE
    counter = Rule(r".*\.num_batches_tracked", None, "counts training steps")
    found = [counter]
    for theirs, ours, last in (
        (rf"{body}embedder\.(\w+)", OURS + r"stem.\1", 2),
        (rf"{body}encoder\.stages\.(\d)((?:\.\w+)+)", OURS + r"stages_\1\2", 3),
    ):
        found += [
            Rule(rf"{theirs}\.convolution\.weight", f"{ours}.conv.weight"),
            Rule(rf"{theirs}\.normalization\.{_NORM}", rf"{ours}.bn.\{last}"),
            Rule(rf"{theirs}\.lab\.(scale|bias)", rf"{ours}.lab.\{last}"),
        ]
    return found
