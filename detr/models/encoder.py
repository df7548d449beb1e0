"""The deformable encoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detr.config import DetectorConfig
from detr.models.attention import DeformableAttention
from detr.models.geometry import SamplingFrame, sampling_frame, token_centres
from detr.models.layers import FeedForward
from detr.models.position import image_positions
from detr.models.structures import LevelShapes


class EncoderLayer(nn.Module):
    """Post-norm layer: deformable self-attention over all levels, feed-forward."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.attention = DeformableAttention(
            config.width, config.heads, config.levels, config.points
        )
        self.norm = nn.LayerNorm(config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.ffn = FeedForward(config.width, config.ffn, config.dropout)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        frame: SamplingFrame,
        padding: Tensor,
        shapes: LevelShapes,
    ) -> Tensor:
        """``[B, S, D]`` to ``[B, S, D]``."""
        update, _, _ = self.attention(tokens + positions, frame, tokens, padding, shapes)
        out: Tensor = self.ffn(self.norm(tokens + self.dropout(update)))
        return out


class Encoder(nn.Module):
    """A stack of layers over the tokens of all levels; with no layers, the identity.

    Without layers there is also no level embedding: nothing would read it.
    """

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.level_embedding: nn.Parameter | None = None
        if config.encoder_layers:
            self.level_embedding = nn.Parameter(torch.empty(config.levels, config.width))
            nn.init.normal_(self.level_embedding)

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
    ) -> list[Tensor]:
        """Returns the input followed by every layer's output, ``[B, S, D]`` each."""
        outputs = [tokens]
        if len(self.layers) == 0:
            return outputs
        frame = sampling_frame(token_centres(ratios, shapes), ratios, shapes, self.config.points)
        for layer in self.layers:
            outputs.append(layer(outputs[-1], positions, frame, padding, shapes))
        return outputs
