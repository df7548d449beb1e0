"""LW-DETR's projector: levels of several maps of one stride (section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn

from detr.config import ProjectorNeckConfig
from detr.models.convolutions import C2fBlock, ConvNorm
from detr.models.layers import NormOf

# Maps with more channels are narrowed before they are enlarged.
_WIDE = 512
# Of the norm after each level.
_EPS = 1e-6


class Projector(nn.Module):
    """Every level resamples all maps and joins them in a C2f block and a layer norm.

    Args:
        config: The levels.
        channels: Of the maps.
        width: Channels of the levels.
    """

    def __init__(self, config: ProjectorNeckConfig, channels: Sequence[int], width: int) -> None:
        super().__init__()
        norm: NormOf = nn.BatchNorm2d
        if config.norm == "layer":
            norm = partial(LayerNorm2d, eps=config.norm_eps)
        narrowed = config.norm == "batch"
        self.resample = nn.ModuleList(
            nn.ModuleList(_resampled(count, scale, norm, narrowed) for count in channels)
            for scale in config.scales
        )
        self.levels = nn.ModuleList()
        for scale in config.scales:
            inputs = sum(_resampled_channels(count, scale, narrowed) for count in channels)
            inner = int(width * config.expansion)
            block = C2fBlock(inputs, inner, width, config.blocks, norm)
            self.levels.append(nn.Sequential(block, LayerNorm2d(width, eps=_EPS)))

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Maps ``[B, C_v, H, W]`` to levels ``[B, width, H_v, W_v]``."""
        levels = []
        for resample, level in zip(self.resample, self.levels, strict=True):
            assert isinstance(resample, nn.ModuleList)
            maps = [step(x) for step, x in zip(resample, features, strict=True)]
            levels.append(level(torch.cat(maps, 1)))
        return levels


def _resampled_channels(channels: int, scale: float, narrowed: bool) -> int:
    """Channels of a map after it was resampled."""
    if scale != 2:
        return channels
    return channels // 4 if narrowed and channels > _WIDE else channels // 2


def _resampled(channels: int, scale: float, norm: NormOf, narrowed: bool) -> nn.Module:
    """What a map goes through to another size.

    Args:
        channels: Of the map.
        scale: 2, 1 or 0.5.
        norm: After a convolution.
        narrowed: Whether wide maps are narrowed before they are enlarged (LW-DETR, not RF-DETR).
    """
    if scale == 1:
        return nn.Identity()
    if scale == 0.5:
        narrow = ConvNorm(channels, channels, 3, stride=2, activate=False, norm=norm)
        return nn.Sequential(narrow, nn.ReLU())
    outputs = _resampled_channels(channels, scale, narrowed)
    if outputs == channels // 2:
        return nn.Sequential(nn.ConvTranspose2d(channels, outputs, 2, stride=2))
    half = channels // 2
    narrow = ConvNorm(channels, half, 1, activate=False, norm=norm)
    return nn.Sequential(narrow, nn.ReLU(), nn.ConvTranspose2d(half, outputs, 2, stride=2))
