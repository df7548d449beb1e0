"""Which backbone and neck a config asks for; a further kind is one entry here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from detr.config import (
    AnyBackboneConfig,
    AnyNeckConfig,
    BackboneConfig,
    Dinov3BackboneConfig,
    NeckConfig,
    ProjectorNeckConfig,
)
from detr.models.backbones.base import AnyBackbone
from detr.models.backbones.dinov3 import Dinov3
from detr.models.backbones.neck import Neck
from detr.models.backbones.projector import Projector
from detr.models.backbones.timm import Backbone
from detr.models.backbones.vit import VisionTransformer

_NECKS: dict[type, Callable[[Any, Sequence[int], int], nn.Module]] = {
    NeckConfig: Neck,
    ProjectorNeckConfig: Projector,
}


def build_backbone(
    config: AnyBackboneConfig, pretrained: bool, finer: tuple[int, ...] = ()
) -> AnyBackbone:
    """A new backbone.

    Args:
        config: Of it.
        pretrained: Load the weights that the config names.
        finer: Strides of further maps, which come first; a vision transformer has none.

    Raises:
        UserError: What :class:`detr.models.backbones.timm.Backbone` raises.
    """
    if isinstance(config, BackboneConfig):
        return Backbone(config, pretrained, finer)
    return Dinov3(config) if isinstance(config, Dinov3BackboneConfig) else VisionTransformer(config)


def build_neck(config: AnyNeckConfig, channels: Sequence[int], width: int) -> nn.Module:
    """A new neck: from the backbone's maps to levels of a width.

    Args:
        config: Of it.
        channels: Of the backbone's maps.
        width: Of the levels.
    """
    return _NECKS[type(config)](config, channels, width)
