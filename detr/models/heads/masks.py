"""Instance masks: a map of pixels, and what queries say of them (Mask DINO, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from detr.config import MASK_STRIDE, DetectorConfig, MasksConfig
from detr.models.backbones.neck import norm_groups
from detr.models.layers import MLP
from detr.models.structures import GroupOutput, Memory, PixelMap


class PixelDecoder(nn.Module):
    """Joins the backbone's map of stride 4 with the encoder's finest one.

    Args:
        masks: Of the detector.
        fine: Channels of the backbone's map.
        width: Of the memory, D.
    """

    def __init__(self, masks: MasksConfig, fine: int, width: int) -> None:
        super().__init__()
        channels = masks.channels or width
        # A lighter head narrows the encoder's map before it is enlarged.
        self.narrow = nn.Conv2d(width, channels, 1) if channels != width else nn.Identity()
        self.lateral = _convolution(fine, channels, 1)
        self.output = _convolution(channels, channels, 3)
        self.project = nn.Conv2d(channels, masks.width, 1)
        for conv in self.modules():
            if isinstance(conv, nn.Conv2d):
                nn.init.kaiming_uniform_(conv.weight, a=1)
                if conv.bias is not None:
                    nn.init.zeros_(conv.bias)

    def forward(self, fine: Tensor, memory: Memory, valid_sizes: Tensor) -> PixelMap:
        """The pixels of a batch.

        Args:
            fine: ``[B, C_4, H_4, W_4]`` of the backbone.
            memory: The batch.
            valid_sizes: ``[B, 2]`` (height, width) of the image inside the canvas, pixels.
        """
        lateral = self.lateral(fine)
        coarse = self.narrow(memory.levels().maps[0])
        enlarged = functional.interpolate(
            coarse, size=lateral.shape[-2:], mode="bilinear", align_corners=False
        )
        joined = functional.relu(self.output(lateral + enlarged))
        return PixelMap(self.project(joined), valid_sizes.flip(-1) / MASK_STRIDE)


def _convolution(inputs: int, outputs: int, side: int) -> nn.Sequential:
    """A convolution with a group norm in place of its bias."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, side, padding=side // 2, bias=False),
        nn.GroupNorm(norm_groups(outputs), outputs),
    )


def build_pixels(config: DetectorConfig, fine: int) -> PixelDecoder | None:
    """A new pixel decoder of a detector, if it has masks.

    Args:
        config: The detector.
        fine: Channels of the backbone's map of stride 4.
    """
    masks = config.heads.masks
    return None if masks is None else PixelDecoder(masks, fine, config.width)


def mask_heads(config: DetectorConfig) -> list[MLP]:
    """What queries say of their masks, one shared or one per layer; none without masks."""
    masks, width = config.heads.masks, config.width
    if masks is None:
        return []
    return [MLP(width, width, width, masks.width) for _ in range(config.decoder.own_heads)]


def chosen_masks(output: GroupOutput, queries: Tensor) -> Tensor:
    """Mask logits ``[B, T, H_4, W_4]`` of some queries ``[B, T]`` of the last layer."""
    told = output.masks[-1]
    assert output.pixels is not None
    return output.pixels.masks(told.gather(1, queries[..., None].expand(-1, -1, told.shape[-1])))


def mask_quality(logits: Tensor, pixels: PixelMap) -> Tensor:
    """Mean probability within each mask, ``[B, T]``; 0 where it is empty (Mask2Former).

    Args:
        logits: ``[B, T, H_4, W_4]``.
        pixels: Of the batch; cells beyond the image do not count.
    """
    inside = (logits > 0) & within(pixels)[:, None]
    part = torch.where(inside, logits.sigmoid(), 0.0).flatten(2).sum(-1)
    return part / (inside.to(logits.dtype).flatten(2).sum(-1) + 1e-6)


def within(pixels: PixelMap) -> Tensor:
    """``[B, H_4, W_4]`` bool: cells whose first pixel lies in the image."""
    height, width = pixels.embedding.shape[-2:]
    like = pixels.valid
    x = torch.arange(width, device=like.device)[None] < pixels.valid[:, :1]
    y = torch.arange(height, device=like.device)[None] < pixels.valid[:, 1:]
    return y[:, :, None] & x[:, None, :]


def boxes_of(logits: Tensor, pixels: PixelMap, whole_cells: bool) -> Tensor:
    """Boxes ``[B, N, 4]`` cx cy w h around masks, relative to the image (Mask DINO, section 3.3).

    An empty mask's box has no size and lies in a corner, as in the published code: the first one,
    or the last where cells' numbers count.

    Args:
        logits: ``[B, N, H_4, W_4]``.
        pixels: Of the batch; cells beyond the image do not count.
        whole_cells: The box reaches to the last cell's far edge; otherwise to its number.
    """
    seen = (logits > 0) & within(pixels)[:, None]
    low, high = [], []
    for axis, count in ((-2, logits.shape[-1]), (-1, logits.shape[-2])):
        line = seen.any(axis)
        number = torch.arange(count, device=logits.device, dtype=logits.dtype)
        last = torch.where(line, number, -1.0).amax(-1)
        low.append(torch.where(line, number, float(count)).amin(-1))
        high.append(last + float(whole_cells))
    scale = pixels.valid[:, None]
    first, second = torch.stack(low, -1) / scale, torch.stack(high, -1) / scale
    any_cell = seen.flatten(2).any(-1)[..., None]
    center = torch.where(any_cell, (first + second) / 2, 0.0 if whole_cells else 1.0)
    return torch.cat((center, torch.where(any_cell, second - first, 0.0)), -1)
