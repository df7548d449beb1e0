"""Renaming of published backbones to timm's names, which ours keep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from detr.config import BackboneConfig
from detr.errors import UserError
from detr.models.weights.renaming import Rule

OURS = "backbone.body."
_NORM = "(weight|bias|running_mean|running_var)"
_AFFINE = "(weight|bias)"
# Of the four stages of a Swin or ConvNeXt.
_STRIDES = (4, 8, 16, 32)
_COUNTER = Rule(r".*\.num_batches_tracked", None, "counts training steps")


def plain_rules(prefix: str) -> tuple[Rule, ...]:
    """Backbones that are published under timm's (and torchvision's) names.

    Args:
        prefix: Regular expression of what stands before the name.
    """
    return (_COUNTER, Rule(rf"{prefix}(.+)", OURS + r"\1"))


def swin_rules(prefix: str, strides: tuple[int, ...]) -> tuple[Rule, ...]:
    """Swins of the original repositories, which keep their authors' names.

    Args:
        prefix: Regular expression of what stands before the name.
        strides: Of the maps the detector takes; those have norms of their own.
    """
    rules = [
        Rule(rf"{prefix}.*\.relative_position_index", None, "follows from the window's size"),
        Rule(rf"{prefix}patch_embed\.(.+)", OURS + r"patch_embed.\1"),
        Rule(rf"{prefix}layers\.(\d)\.blocks\.(.+)", OURS + r"layers_\1.blocks.\2"),
    ]
    # Theirs end with the merging of patches that ours begin the next stage with.
    rules += [
        Rule(
            rf"{prefix}layers\.{stage}\.downsample\.(.+)",
            rf"{OURS}layers_{stage + 1}.downsample.\1",
        )
        for stage in range(len(_STRIDES))
    ]
    return (*rules, *_norm_rules(prefix, strides))


def convnext_rules(prefix: str, strides: tuple[int, ...]) -> tuple[Rule, ...]:
    """ConvNeXts under their authors' names; arguments as :func:`swin_rules`."""
    block = rf"{prefix}stages\.(\d)\.(\d+)\."
    ours = OURS + r"stages_\1.blocks.\2."
    return (
        Rule(rf"{prefix}downsample_layers\.0\.([01])\.{_AFFINE}", OURS + r"stem_\1.\2"),
        Rule(
            rf"{prefix}downsample_layers\.(\d)\.([01])\.{_AFFINE}",
            OURS + r"stages_\1.downsample.\2.\3",
        ),
        Rule(rf"{block}gamma", ours + "gamma"),
        Rule(rf"{block}norm\.{_AFFINE}", ours + r"norm.\3"),
        Rule(rf"{block}dwconv\.{_AFFINE}", ours + r"conv_dw.\3"),
        Rule(rf"{block}pwconv([12])\.{_AFFINE}", ours + r"mlp.fc\3.\4"),
        *_norm_rules(prefix, strides),
    )


def _norm_rules(prefix: str, strides: tuple[int, ...]) -> tuple[Rule, ...]:
    """The norms of a backbone's maps, which its authors number by stage."""
    first = len(_STRIDES) - len(strides)
    return tuple(
        Rule(
            rf"{prefix}norm{stage}\.{_AFFINE}",
            rf"backbone.norms.{stage - first}.\1" if stage >= first else None,
            "of a map the detector does not take",
        )
        for stage in range(len(_STRIDES))
    )


def transformers_resnet_rules(prefix: str, bottleneck: bool) -> tuple[Rule, ...]:
    """ResNets of the transformers library.

    Args:
        prefix: Regular expression of what stands before the name.
        bottleneck: Blocks have three convolutions, else two.
    """
    rules = [
        _COUNTER,
        Rule(rf"{prefix}embedder\.embedder\.convolution\.weight", OURS + "conv1.weight"),
        Rule(rf"{prefix}embedder\.embedder\.normalization\.{_NORM}", OURS + r"bn1.\1"),
    ]
    for stage in range(4):
        block = rf"{prefix}encoder\.stages\.{stage}\.layers\.(\d+)\."
        ours = rf"{OURS}layer{stage + 1}.\1."
        rules += [
            Rule(rf"{block}shortcut\.convolution\.weight", ours + "downsample.0.weight"),
            Rule(rf"{block}shortcut\.normalization\.{_NORM}", ours + r"downsample.1.\2"),
        ]
        for conv in range(3 if bottleneck else 2):
            source = rf"{block}layer\.{conv}\."
            rules += [
                Rule(rf"{source}convolution\.weight", f"{ours}conv{conv + 1}.weight"),
                Rule(rf"{source}normalization\.{_NORM}", rf"{ours}bn{conv + 1}.\2"),
            ]
    return tuple(rules)


def transformers_backbone(
    config: Mapping[str, Any], strides: tuple[int, ...], place: str
) -> BackboneConfig:
    """Our config of the backbone a transformers detector names.

    Args:
        config: The detector's whole ``config.json``.
        strides: Of the maps the detector takes.
        place: The source, for messages.

    Raises:
        UserError: ``weights-backbone`` for one that is neither timm's nor a ResNet.
    """
    inner = config.get("backbone_config") or {}
    kind = inner.get("model_type", "timm_backbone" if config.get("backbone") else "resnet")
    dilated = bool(config.get("dilation")) or inner.get("output_stride") == 16
    options: dict[str, Any] = {"output_stride": 16} if dilated else {}
    if kind == "timm_backbone":
        name = inner.get("backbone") or config.get("backbone") or "resnet50"
        return BackboneConfig(name=name, strides=strides, norm="frozen", options=options)
    if kind != "resnet":
        raise UserError(
            "weights-backbone", f"{place}: backbone {kind!r} is not supported, only timm and resnet"
        )
    bottleneck = inner.get("layer_type", "bottleneck") == "bottleneck"
    widths = [int(w) for w in inner.get("hidden_sizes", (256, 512, 1024, 2048))]
    depths = [int(d) for d in inner.get("depths", (3, 4, 6, 3))]
    expansion = 4 if bottleneck else 1
    options |= {"channels": [w // expansion for w in widths], "layers": depths}
    name = "resnet50" if bottleneck else "resnet18"
    return BackboneConfig(name=name, strides=strides, norm="frozen", options=options)
