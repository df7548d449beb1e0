"""The block of every vision transformer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torch.nn import functional

from detr.config import AnyVitConfig
from detr.models.attention.deformable import split_heads
from detr.models.layers import SwiGLU


class Rotation(NamedTuple):
    """How far each pair of a token's channels is turned (Su et al. 2021, RoPE).

    Attributes:
        cosine, sine: ``[T, C]`` of each token and channel of a head; a channel and the one half of
            all channels further are a pair.
    """

    cosine: Tensor
    sine: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """``[B, M, T, C]`` turned."""
        first, second = x.chunk(2, -1)
        return x * self.cosine + torch.cat((-second, first), -1) * self.sine


class Block(nn.Module):
    """Pre-norm block, whose branches may be scaled.

    Args:
        config: The backbone.
        number: From 0.
        ffn: Hidden channels of its feed-forward network.
        first_scale: Of its branches at first; ``None`` where they are not scaled.
        eps: Of its norms.
        windowed: Whether tokens look at their own window alone.
        gated: SwiGLU in place of GELU.
    """

    def __init__(
        self,
        config: AnyVitConfig,
        number: int,
        ffn: int,
        first_scale: float | None,
        eps: float,
        windowed: bool = False,
        gated: bool = False,
    ) -> None:
        super().__init__()
        width, self.heads = config.width, config.heads
        self.windowed = windowed
        self.norm = nn.LayerNorm(width, eps)
        # LW-DETR's and DINOv3's keys have no bias; without rotations one would add the same to all
        # logits of a query.
        self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.ffn_norm = nn.LayerNorm(width, eps)
        self.expand = nn.Linear(width, 2 * ffn if gated else ffn)
        self.activation = SwiGLU() if gated else nn.GELU()
        self.contract = nn.Linear(ffn, width)
        self.scale: nn.Parameter | None = None
        self.ffn_scale: nn.Parameter | None = None
        if first_scale is not None:
            self.scale = nn.Parameter(torch.full((width,), first_scale))
            self.ffn_scale = nn.Parameter(torch.full((width,), first_scale))
        share = number / max(1, config.depth - 1)
        self.skip = DropPath(config.drop_path * share)

    def forward(self, tokens: Tensor, allowed: Tensor, rotation: Rotation | None = None) -> Tensor:
        """``[B * R * R, T, C]`` to the same; without windows R is 1.

        Args:
            tokens: Window by window.
            allowed: ``[B * R * R, 1, 1, T]`` bool, for a block without windows
                ``[B, 1, 1, R * R * T]``: which tokens may be looked at.
            rotation: Tells queries and keys where they are.
        """
        seen = self.norm(tokens)
        if not self.windowed:
            seen = seen.reshape(allowed.shape[0], -1, seen.shape[-1])
        query, key, value = (
            split_heads(x, self.heads) for x in self.query_key_value(seen).chunk(3, -1)
        )
        if rotation is not None:
            query, key = rotation(query), rotation(key)
        found = functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
        update = self.output(found.transpose(1, 2).flatten(2)).reshape(tokens.shape)
        tokens = tokens + self.skip(_scaled(self.scale, update))
        hidden = self.activation(self.expand(self.ffn_norm(tokens)))
        out: Tensor = tokens + self.skip(_scaled(self.ffn_scale, self.contract(hidden)))
        return out


def _scaled(scale: nn.Parameter | None, branch: Tensor) -> Tensor:
    """A branch, scaled where it is."""
    return branch if scale is None else scale * branch


def start_linears(transformer: nn.Module) -> None:
    """First values of all linear maps of a vision transformer."""
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
