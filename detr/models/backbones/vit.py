"""Vision transformers as detectors' backbones: windows in most blocks, on a canvas of any aspect.

LW-DETR (Chen et al. 2024, section 3.1) and, over DINOv2, RF-DETR (Robinson et al. 2025). Tokens
stay in the order of their windows all the way, so that blocks of either kind need no rearranging
(LW-DETR's "window-major" maps).

Legend: C channels, H x W cells of the canvas, R windows in a row or column, T tokens of a window.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from detr.config import WindowedVitConfig
from detr.models.backbones.base import AnyBackbone
from detr.models.backbones.bicubic import bicubic_weights
from detr.models.backbones.vit_block import Block, start_linears
from detr.models.geometry import constant, padding_mask, valid_ratios

# The layer norms' in both.
_EPS = 1e-6


class VisionTransformer(AnyBackbone):
    """A map after each tapped block.

    Whatever the canvas' aspect, it is cut into rows and columns of windows; where they do not come
    out even, cells are added at the right and bottom. Cells in the padding, added or not, are not
    looked at. Published codes cut square canvases alone (transformers' RF-DETR takes a window's
    height for its width) and look at the padding of an image.
    """

    def __init__(self, config: WindowedVitConfig) -> None:
        super().__init__()
        self.config = config
        self.channels = (config.width,) * len(config.taps)
        self.embed = nn.Conv2d(3, config.width, config.patch, stride=config.patch)
        self.positions = nn.Parameter(torch.empty(config.side, config.side, config.width))
        nn.init.trunc_normal_(self.positions, std=0.02)
        self.class_token: nn.Parameter | None = None
        self.final_norm: nn.LayerNorm | None = None
        if config.class_token:
            self.class_token = nn.Parameter(torch.empty(config.width))
            nn.init.trunc_normal_(self.class_token, std=0.02)
            self.final_norm = nn.LayerNorm(config.width, _EPS)
        self.blocks = nn.ModuleList(self._block(i) for i in range(config.depth))
        start_linears(self)

    def _block(self, number: int) -> Block:
        """A new block; ``number`` counts from 0."""
        config = self.config
        return Block(
            config,
            number,
            ffn=4 * config.width,
            first_scale=config.first_scale,
            eps=_EPS,
            windowed=number in config.windowed,
        )

    def forward(self, images: Tensor, valid_sizes: Tensor) -> list[Tensor]:
        """See the base class."""
        config = self.config
        canvas = (images.shape[-2], images.shape[-1])
        below, beside = (-size % config.patch for size in canvas)
        if below or beside:
            images = functional.pad(images, (0, beside, 0, below))
        cells = self.embed(images).permute(0, 2, 3, 1)
        shape = (int(cells.shape[1]), int(cells.shape[2]))
        tokens = self._cut(cells + self._positions(shape))
        if self.class_token is not None:
            first = self.class_token.expand(tokens.shape[0], 1, -1)
            tokens = torch.cat((first, tokens), 1)
        valid = ~padding_mask(valid_ratios(valid_sizes, (shape,), canvas), (shape,))
        windows, everywhere = self._allowed(torch.unflatten(valid, 1, shape)[..., None])
        maps = []
        for number, block in enumerate(self.blocks, start=1):
            tokens = block(tokens, windows if block.windowed else everywhere)
            if number in config.taps:
                maps.append(self._map(tokens, shape))
        return maps

    def _positions(self, shape: tuple[int, int]) -> Tensor:
        """``[H, W, C]``: the learned grid, stretched over the canvas."""
        side, antialias = self.config.side, self.config.antialias
        rows, columns = (
            constant(bicubic_weights(size, side, antialias), self.positions) for size in shape
        )
        return torch.einsum("hi,wj,ijc->hwc", rows, columns, self.positions)

    def _allowed(self, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Masks of blocks with and without windows, see :meth:`Block.forward`.

        A window outside the image looks at its first cell, since nothing would be no number; a
        window that reaches into the image has its first cell there, so nothing else changes.

        Args:
            valid: ``[B, H, W, 1]`` bool, of cells inside the image.
        """
        windows = self._cut(valid)[..., 0]
        everywhere = windows
        if self.class_token is None:
            corner = torch.zeros_like(windows)
            corner[:, 0] = True
            windows = windows | corner
        else:
            place = torch.ones_like(windows[:, :1])
            windows = everywhere = torch.cat((place, windows), 1)
        return windows[:, None, None], everywhere.reshape(valid.shape[0], 1, 1, -1)

    def _cut(self, cells: Tensor) -> Tensor:
        """``[B, H, W, C]`` to windows ``[B * R * R, T, C]``; added cells are zero."""
        count = self.config.windows
        below, beside = -cells.shape[1] % count, -cells.shape[2] % count
        if below or beside:
            cells = functional.pad(cells, (0, 0, 0, beside, 0, below))
        cells = torch.unflatten(torch.unflatten(cells, 2, (count, -1)), 1, (count, -1))
        return cells.transpose(2, 3).flatten(3, 4).flatten(0, 2)

    def _map(self, tokens: Tensor, shape: tuple[int, int]) -> Tensor:
        """Windows ``[B * R * R, T, C]`` to a map ``[B, C, H, W]`` without what was added."""
        if self.final_norm is not None:
            tokens = self.final_norm(tokens)[:, 1:]
        count = self.config.windows
        height, width = (-(-size // count) for size in shape)
        cells = torch.unflatten(torch.unflatten(tokens, 1, (height, width)), 0, (-1, count, count))
        whole = cells.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return whole[:, : shape[0], : shape[1]].permute(0, 3, 1, 2)
