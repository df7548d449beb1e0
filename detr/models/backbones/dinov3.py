"""DEIMv2's backbone: DINOv3 and a spatial tuning adapter.

Huang et al. 2025, Real-Time Object Detection Meets DINOv3, section 3; the transformer is that of
Simeoni et al. 2025, DINOv3. Its maps have one stride. They are resized to three, and beside each
lies the map that a few convolutions make of the image itself.

Legend: C channels, H x W cells of the canvas, T tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from detr.config import Dinov3BackboneConfig
from detr.models.backbones.base import AnyBackbone
from detr.models.backbones.vit_block import Block, Rotation, start_linears
from detr.models.convolutions import ConvNorm
from detr.models.geometry import padding_mask, valid_ratios

# Of the longest period to the shortest, almost: what DINOv3 counts periods by.
_BASE = 100.0


class Dinov3(AnyBackbone):
    """Maps of strides 8, 16 and 32, on a canvas of any aspect.

    A token's place is its part of the canvas' height and width, as in the published code. Cells in
    the padding are not looked at, which that code has none of; a canvas that is no multiple of the
    coarsest cells is filled up for the transformer and the adapter, and what lies beyond is cut.
    """

    periods: Tensor

    def __init__(self, config: Dinov3BackboneConfig) -> None:
        super().__init__()
        self.config = config
        width, detail = config.width, config.detail
        self.channels = (width + 2 * detail, width + 4 * detail, width + 4 * detail)
        self.embed = nn.Conv2d(3, width, config.patch, stride=config.patch)
        self.first_tokens = nn.Parameter(torch.empty(1 + config.registers, width))
        nn.init.trunc_normal_(self.first_tokens, std=0.02)
        self.blocks = nn.ModuleList(
            Block(
                config,
                number,
                ffn=config.ffn,
                first_scale=config.first_scale,
                eps=config.norm_eps,
                gated=config.activation == "swiglu",
            )
            for number in range(config.depth)
        )
        self.final_norm = nn.LayerNorm(width, config.norm_eps) if config.final_norm else None
        self.register_buffer("periods", rotation_periods(width // config.heads))
        self.adapter = SpatialAdapter(detail)
        start_linears(self)

    def forward(self, images: Tensor, valid_sizes: Tensor) -> list[Tensor]:
        """See the base class."""
        strides, patch = self.config.strides, self.config.patch
        height, width = images.shape[-2:]
        whole = math.lcm(strides[-1], patch)
        below, beside = -height % whole, -width % whole
        if below or beside:
            images = functional.pad(images, (0, beside, 0, below))
        semantic = self._transformed(images, valid_sizes, (height / patch, width / patch))
        maps = []
        for stride, meaning, details in zip(strides, semantic, self.adapter(images), strict=True):
            if meaning.shape[-2:] != details.shape[-2:]:
                shape = (int(details.shape[-2]), int(details.shape[-1]))
                meaning = functional.interpolate(meaning, shape, mode="bilinear")
            both = torch.cat((meaning, details), 1)
            maps.append(both[..., : -(-height // stride), : -(-width // stride)])
        return maps

    def _transformed(
        self, images: Tensor, valid_sizes: Tensor, extent: tuple[float, float]
    ) -> list[Tensor]:
        """The transformer's maps ``[B, C, H, W]`` after each tap.

        Args:
            images: ``[B, 3, H * patch, W * patch]``.
            valid_sizes: See the base class.
            extent: (height, width) of the canvas before it was filled up, in cells.
        """
        cells = self.embed(images)
        shape = (int(cells.shape[-2]), int(cells.shape[-1]))
        canvas = (int(images.shape[-2]), int(images.shape[-1]))
        first = self.first_tokens.expand(cells.shape[0], -1, -1)
        tokens = torch.cat((first, cells.flatten(2).transpose(1, 2)), 1)
        inside = ~padding_mask(valid_ratios(valid_sizes, (shape,), canvas), (shape,))
        placeless = torch.ones_like(inside[:, :1]).expand(-1, first.shape[1])
        allowed = torch.cat((placeless, inside), 1)[:, None, None]
        rotation = self._rotation(shape, extent, tokens.dtype)
        maps = []
        for number, block in enumerate(self.blocks, start=1):
            tokens = block(tokens, allowed, rotation)
            if number in self.config.taps:
                shown = tokens if self.final_norm is None else self.final_norm(tokens)
                placed = shown[:, first.shape[1] :].transpose(1, 2)
                maps.append(torch.unflatten(placed, 2, shape))
        return maps

    def _rotation(
        self, shape: tuple[int, int], extent: tuple[float, float], dtype: torch.dtype
    ) -> Rotation:
        """Of all tokens; those of no place are not turned."""
        angles = []
        for axis, (cells, size) in enumerate(zip(shape, extent, strict=True)):
            places = torch.arange(cells, device=self.periods.device) + 0.5
            along = (2 * places / size - 1)[:, None] * 2 * math.pi / self.periods.float()
            along = along[:, None] if axis == 0 else along[None]
            angles.append(along.expand(*shape, -1))
        turned = torch.cat(angles, -1).flatten(0, 1).repeat(1, 2)
        turned = functional.pad(turned, (0, 0, len(self.first_tokens), 0))
        return Rotation(turned.cos().to(dtype), turned.sin().to(dtype))


def rotation_periods(channels: int) -> Tensor:
    """``[channels / 4]`` periods, in halves of a side, of a head with so many channels."""
    steps = torch.arange(channels // 4, dtype=torch.float32)
    periods: Tensor = _BASE ** (2 * steps / (channels // 2))
    return periods


class SpatialAdapter(nn.Module):
    """Convolutions of the image, for details (the paper's spatial tuning adapter).

    Args:
        channels: After the first convolution.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem = _halved(3, channels)
        steps = ((channels, 2 * channels), (2 * channels, 4 * channels), (4 * channels,) * 2)
        self.steps = nn.ModuleList(_halved(inputs, outputs) for inputs, outputs in steps)

    def forward(self, images: Tensor) -> list[Tensor]:
        """``[B, 3, H, W]`` to maps of strides 8, 16 and 32."""
        x = functional.max_pool2d(functional.gelu(self.stem(images)), 3, stride=2, padding=1)
        maps: list[Tensor] = []
        for step in self.steps:
            maps.append(step(functional.gelu(maps[-1]) if maps else x))
        return maps


def _halved(inputs: int, outputs: int) -> ConvNorm:
    """A convolution to half the size, and its norm."""
    return ConvNorm(inputs, outputs, 3, stride=2, activate=False)
