"""The encoder: deformable over several levels or dense over one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detr.config import DetectorConfig
from detr.models.attention.deformable import (
    DeformableAttention,
    GroupedSelfAttention,
    GroupSpan,
    token_span,
)
from detr.models.geometry import SamplingFrame, sampling_frame, token_centres
from detr.models.layers import FeedForward, inner_mlp
from detr.models.queries.position import image_positions
from detr.models.structures import LevelShapes


class EncoderLayer(nn.Module):
    """Post-norm layer: self-attention over all tokens, feed-forward."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.attention = (
            DeformableAttention(config.width, config.heads, config.levels, config.points)
            if config.attention == "deformable"
            else GroupedSelfAttention(config.width, config.heads, config.dropout)
        )
        self.norm = nn.LayerNorm(config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.ffn = FeedForward(config)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        place: SamplingFrame | list[GroupSpan],
        padding: Tensor,
        shapes: LevelShapes,
    ) -> Tensor:
        """``[B, S, D]`` to ``[B, S, D]``; ``place`` says where tokens look, sampled or densely."""
        if isinstance(self.attention, DeformableAttention):
            assert isinstance(place, SamplingFrame)
            update, _, _ = self.attention(tokens + positions, place, tokens, padding, shapes)
        else:
            update, _ = self.attention(tokens, positions, place)
        out: Tensor = self.ffn(self.norm(tokens + self.dropout(update)))
        return out


class MemoryFusion(nn.Module):
    """Combines encoder layers into the memory the decoder reads (Stable-DINO section 4.3).

    ``simple`` joins the encoder's input and last output, ``dense`` all of them. ``u`` works along
    the way, as a U-Net's skip connections do: from the middle on, each layer's output is joined
    with the one as far from the start as it is from the end. A joint is a linear map to the width
    and a layer norm.
    """

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        assert config.memory_fusion is not None
        self.kind, self.depth = config.memory_fusion, config.encoder_layers
        counts = {"simple": [2], "dense": [self.depth + 1], "u": [2] * ((self.depth + 1) // 2)}
        self.joints = nn.ModuleList()
        for count in counts[self.kind]:
            linear = nn.Linear(count * config.width, config.width)
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
            self.joints.append(nn.Sequential(linear, nn.LayerNorm(config.width)))

    def along(self, layers: list[Tensor]) -> Tensor:
        """What the next layer reads.

        Args:
            layers: The encoder's input and every layer's output so far, ``[B, S, D]`` each.
        """
        step = len(layers) - 1
        if self.kind != "u" or step <= self.depth // 2:
            return layers[-1]
        return self._join(step - self.depth // 2 - 1, layers[-1], layers[self.depth - step])

    def after(self, layers: list[Tensor]) -> Tensor:
        """The memory, of the encoder's input and every layer's output."""
        if self.kind == "u":
            return layers[-1]
        return self._join(0, *(layers if self.kind == "dense" else (layers[0], layers[-1])))

    def _join(self, index: int, *parts: Tensor) -> Tensor:
        out: Tensor = self.joints[index](torch.cat(parts, -1))
        return out


class Encoder(nn.Module):
    """A stack of layers over the tokens of all levels; with no layers, the identity.

    Without layers there is also no level embedding: nothing would read it. A single level, dense,
    has none either.
    """

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.level_embedding: nn.Parameter | None = None
        deformable = config.attention == "deformable"
        if config.encoder_layers and deformable:
            self.level_embedding = nn.Parameter(torch.empty(config.levels, config.width))
            nn.init.normal_(self.level_embedding)
        # DAB-DETR rescales the positions by the content of every layer's input.
        rescaled = config.encoder_layers and config.query == "anchors" and not deformable
        self.position_scale = (
            inner_mlp(config.width, config.width, config.width) if rescaled else None
        )
        self.fusion = MemoryFusion(config) if config.memory_fusion is not None else None

    def positions(self, ratios: Tensor, shapes: LevelShapes) -> Tensor:
        """``[B, S, D]`` sine position of every token plus its level's embedding."""
        config = self.config
        levels = image_positions(
            ratios, shapes, config.width, config.pe_temperature, config.pe_offset
        )
        if self.level_embedding is not None:
            levels = [x + self.level_embedding[i] for i, x in enumerate(levels)]
        return torch.cat(levels, 1)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        padding: Tensor,
        ratios: Tensor,
        shapes: LevelShapes,
    ) -> tuple[Tensor, list[Tensor]]:
        """The memory, and the input followed by every layer's output, ``[B, S, D]`` each."""
        outputs = [tokens]
        if len(self.layers) == 0:
            return tokens, outputs
        place: SamplingFrame | list[GroupSpan]
        if self.config.attention == "deformable":
            centres = token_centres(ratios, shapes)
            place = sampling_frame(centres, ratios, shapes, self.config.points)
        else:
            place = token_span(padding)
        for layer in self.layers:
            scaled = positions
            if self.position_scale is not None:
                scaled = positions * self.position_scale(outputs[-1])
            outputs.append(layer(outputs[-1], scaled, place, padding, shapes))
            if self.fusion is not None:
                outputs[-1] = self.fusion.along(outputs)
        memory = outputs[-1] if self.fusion is None else self.fusion.after(outputs)
        return memory, outputs
