"""Brings backbone maps to one width and adds coarser levels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


def norm_groups(width: int) -> int:
    """Groups of a group norm: 32 at width 256 and above, never fewer than 8 channels each.

    Narrow models would otherwise normalize single channels, which erases their mean.
    """
    return max(g for g in range(1, 33) if width % g == 0 and width // g >= min(8, width))


class Neck(nn.Module):
    """1x1 convolution per backbone map, stride-2 3x3 convolutions for further levels.

    The first further level is made from the coarsest *backbone* map, later ones from the level
    before (Deformable DETR, appendix A.2).

    Args:
        channels: Of the backbone maps, finest first.
        levels: Number of levels that come out.
        width: Their channels D.
        normalize: Group norm after each convolution, which then starts as Xavier's; DETR has
            none and torch's own start.
    """

    def __init__(
        self, channels: Sequence[int], levels: int, width: int, normalize: bool = True
    ) -> None:
        super().__init__()
        convs: list[nn.Conv2d] = [nn.Conv2d(c, width, 1) for c in channels]
        for extra in range(levels - len(channels)):
            inputs = channels[-1] if extra == 0 else width
            convs.append(nn.Conv2d(inputs, width, 3, stride=2, padding=1))
        for conv in convs if normalize else ():
            nn.init.xavier_uniform_(conv.weight)
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)
        groups = norm_groups(width)
        self.projections = nn.ModuleList(
            nn.Sequential(conv, *([nn.GroupNorm(groups, width)] if normalize else []))
            for conv in convs
        )

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """``[B, C_v, H_v, W_v]`` backbone maps to ``[B, D, H_v, W_v]`` levels."""
        levels: list[Tensor] = []
        for i, projection in enumerate(self.projections):
            if i < len(features):
                source = features[i]
            else:
                source = features[-1] if i == len(features) else levels[-1]
            levels.append(projection(source))
        return levels
