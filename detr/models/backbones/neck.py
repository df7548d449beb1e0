"""Brings backbone maps to one width and adds coarser levels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from detr.config import NeckConfig
from detr.models.convolutions import pooled_downsample


def norm_groups(width: int) -> int:
    """Groups of a group norm: 32 at width 256 and above, never fewer than 8 channels each.

    Narrow models would otherwise normalize single channels, which erases their mean.
    """
    return max(g for g in range(1, 33) if width % g == 0 and width // g >= min(8, width))


def _norms(config: NeckConfig, width: int) -> list[nn.Module]:
    """What follows a convolution."""
    if config.batch_norm:
        return [nn.BatchNorm2d(width)]
    return [nn.GroupNorm(norm_groups(width), width)] if config.group_norm else []


class Neck(nn.Module):
    """1x1 convolution per backbone map, stride-2 3x3 convolutions for further levels.

    The first further level is made from the coarsest *backbone* map, later ones from the level
    before (Deformable DETR, appendix A.2).

    With a group norm, convolutions start as Xavier's; DETR has none and torch's own start, as has
    RT-DETR, whose norm is over the batch.

    Args:
        config: Number of levels that come out, and what follows each convolution.
        channels: Of the backbone maps, finest first.
        width: Channels of the levels.
    """

    def __init__(self, config: NeckConfig, channels: Sequence[int], width: int) -> None:
        super().__init__()
        bias = not config.batch_norm
        convs: list[nn.Conv2d] = [nn.Conv2d(c, width, 1, bias=bias) for c in channels]
        further = config.levels - len(channels)
        for extra in range(0 if config.pooled else further):
            inputs = channels[-1] if extra == 0 else width
            convs.append(nn.Conv2d(inputs, width, 3, stride=2, padding=1, bias=bias))
        for conv in convs if config.group_norm else ():
            nn.init.xavier_uniform_(conv.weight)
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)
        self.projections = nn.ModuleList(
            nn.Sequential(conv, *_norms(config, width)) for conv in convs
        )
        self.pooled = nn.ModuleList(
            pooled_downsample(width) for _ in range(further if config.pooled else 0)
        )

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """``[B, C_v, H_v, W_v]`` backbone maps to ``[B, width, H_v, W_v]`` levels."""
        levels: list[Tensor] = []
        for i, projection in enumerate(self.projections):
            if i < len(features):
                source = features[i]
            else:
                source = features[-1] if i == len(features) else levels[-1]
            levels.append(projection(source))
        for step in self.pooled:
            levels.append(step(levels[-1]))
        return levels
