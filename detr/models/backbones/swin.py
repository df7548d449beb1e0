"""Swin backbones on canvases of any size, as detectors use them.

timm builds Swin for one image size: a stage whose map is no larger than a window stops shifting,
and a map that is no multiple of the window is shifted before it is padded, so tokens of opposite
edges see each other. Detectors (Liu et al. 2021, section 4.2) shift in every stage and pad first.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.patch_embed import PatchEmbed
from timm.models.swin_transformer import SwinTransformerBlock, window_partition, window_reverse
from torch import Tensor, nn
from torch.nn import functional

MODULE = SwinTransformerBlock.__module__
# What timm must be told to accept other canvases than its own.
OPTIONS: dict[str, Any] = {"strict_img_size": False, "always_partition": True}
# Added to the scores of tokens that are neighbors only because the map was rolled.
_APART = -100.0


class _Block(SwinTransformerBlock):
    """A block whose windows are those of the padded map."""

    def _attn(self, x: Tensor) -> Tensor:
        """Shifted window attention, ``[B, H, W, C]`` to the same."""
        height, width = x.shape[1:3]
        down, right = (
            -size % window for size, window in zip((height, width), self.window_size, strict=True)
        )
        x = functional.pad(x, (0, 0, 0, right, 0, down))
        shifts, mask = self.shift_size, None
        if any(shifts):
            x = torch.roll(x, (-shifts[0], -shifts[1]), (1, 2))
            mask = self._neighbors(height + down, width + right, x)
        windows = window_partition(x, self.window_size).flatten(1, 2)
        seen = self.attn(windows, mask=mask).unflatten(1, self.window_size)
        x = window_reverse(seen, self.window_size, height + down, width + right)
        if any(shifts):
            x = torch.roll(x, shifts, (1, 2))
        return x[:, :height, :width].contiguous()

    def _neighbors(self, height: int, width: int, like: Tensor) -> Tensor:
        """``[windows, T, T]`` added to the scores: zero between tokens of one region."""
        axes = []
        for size, window, shift in zip(
            (height, width), self.window_size, self.shift_size, strict=True
        ):
            cell = torch.arange(size, device=like.device)
            axes.append((cell >= size - window).long() + (cell >= size - shift).long())
        region = (3 * axes[0][:, None] + axes[1])[None, :, :, None]
        region = window_partition(region, self.window_size).flatten(1)
        return (region[:, None] != region[:, :, None]).to(like.dtype) * _APART


def take_any_canvas(body: nn.Module) -> None:
    """Makes a timm Swin, built with :data:`OPTIONS`, answer on any canvas as detectors' do."""
    for module in body.modules():
        if type(module) is SwinTransformerBlock:
            module.__class__ = _Block
        if isinstance(module, PatchEmbed):
            module.dynamic_img_pad = True  # canvases that 4 does not divide
