"""Encoders of tokens: deformable over several levels or dense over one."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from detr.config import DeformableEncoderConfig, DenseEncoderConfig, DetectorConfig, LayerStack
from detr.config.encoder import TokenEncoderConfig
from detr.models.attention.deformable import (
    DeformableAttention,
    GroupedSelfAttention,
    GroupSpan,
    token_span,
)
from detr.models.encoders.base import Encoder
from detr.models.geometry import SamplingFrame, sampling_frame, token_centers
from detr.models.layers import MLP, FeedForward, inner_mlp
from detr.models.queries.position import token_positions
from detr.models.structures import Levels, LevelShapes, Memory


class EncoderLayer(nn.Module, ABC):
    """Post-norm layer: self-attention over all tokens, feed-forward.

    Args:
        config: The detector.
        stack: Its encoder.
        attention: Of the layer.
    """

    def __init__(self, config: DetectorConfig, stack: LayerStack, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention
        self.norm = nn.LayerNorm(config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.ffn = FeedForward(config.width, stack, config.dropout)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        place: SamplingFrame | list[GroupSpan],
        padding: Tensor,
        shapes: LevelShapes,
    ) -> Tensor:
        """``[B, S, D]`` to ``[B, S, D]``; ``place`` says where tokens look, sampled or densely."""
        update = self._attend(tokens, positions, place, padding, shapes)
        out: Tensor = self.ffn(self.norm(tokens + self.dropout(update)))
        return out

    @abstractmethod
    def _attend(
        self,
        tokens: Tensor,
        positions: Tensor,
        place: SamplingFrame | list[GroupSpan],
        padding: Tensor,
        shapes: LevelShapes,
    ) -> Tensor:
        """What attention adds to the tokens, ``[B, S, D]``."""


class DeformableEncoderLayer(EncoderLayer):
    """A layer whose tokens sample all levels."""

    def __init__(self, config: DetectorConfig, encoder: DeformableEncoderConfig) -> None:
        super().__init__(
            config,
            encoder,
            DeformableAttention(
                config.width, config.attention_heads, config.neck.levels, encoder.points
            ),
        )

    def _attend(
        self,
        tokens: Tensor,
        positions: Tensor,
        place: SamplingFrame | list[GroupSpan],
        padding: Tensor,
        shapes: LevelShapes,
    ) -> Tensor:
        update: Tensor = self.attention(tokens + positions, place, tokens, padding, shapes)[0]
        return update


class DenseEncoderLayer(EncoderLayer):
    """A layer whose tokens look at each other."""

    def __init__(self, config: DetectorConfig, encoder: LayerStack) -> None:
        super().__init__(
            config,
            encoder,
            GroupedSelfAttention(config.width, config.attention_heads, config.dropout),
        )

    def _attend(
        self,
        tokens: Tensor,
        positions: Tensor,
        place: SamplingFrame | list[GroupSpan],
        padding: Tensor,
        shapes: LevelShapes,
    ) -> Tensor:
        update: Tensor = self.attention(tokens, positions, place)[0]
        return update


class MemoryFusion(nn.Module):
    """Combines encoder layers into the memory the decoder reads (Stable-DINO section 4.3).

    ``simple`` joins the encoder's input and last output, ``dense`` all of them. ``u`` works along
    the way, as a U-Net's skip connections do: from the middle on, each layer's output is joined
    with the one as far from the start as it is from the end. A joint is a linear map to the width
    and a layer norm.

    Args:
        kind: Of these.
        depth: Number of encoder layers.
        width: D.
    """

    def __init__(self, kind: str, depth: int, width: int) -> None:
        super().__init__()
        self.kind, self.depth = kind, depth
        counts = {"simple": [2], "dense": [depth + 1], "u": [2] * ((depth + 1) // 2)}
        self.joints = nn.ModuleList()
        for count in counts[kind]:
            linear = nn.Linear(count * width, width)
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
            self.joints.append(nn.Sequential(linear, nn.LayerNorm(width)))

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


class TokenEncoder(Encoder):
    """A stack of layers over the tokens of all levels; with no layers, the identity.

    Without layers there is also no level embedding and no position scale: nothing would read them.

    Args:
        config: The detector.
        layers: In order.
    """

    def __init__(self, config: DetectorConfig, layers: list[EncoderLayer]) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(layers)
        self.level_embedding: nn.Parameter | None = None
        self.position_scale: MLP | None = None
        self.fusion: MemoryFusion | None = None

    def _fuse(self, encoder: TokenEncoderConfig) -> None:
        """Adds what combines the layers, last, where the config asks for it."""
        if encoder.fusion is not None:
            self.fusion = MemoryFusion(encoder.fusion, encoder.layers, self.config.width)

    @abstractmethod
    def _place(
        self, padding: Tensor, ratios: Tensor, shapes: LevelShapes
    ) -> SamplingFrame | list[GroupSpan]:
        """Where tokens look."""

    def encode(self, levels: Levels) -> Memory:
        """See the base class."""
        shapes, ratios, padding = levels.shapes, levels.valid_ratios, levels.padding
        tokens, positions = levels.tokens(), self.positions(ratios, shapes)
        memory, layers = self(tokens, positions, padding, ratios, shapes)
        return Memory(memory, shapes, padding, ratios, positions, layers=layers)

    def positions(self, ratios: Tensor, shapes: LevelShapes) -> Tensor:
        """``[B, S, D]`` sine position of every token plus its level's embedding."""
        levels = token_positions(self.config.positions, ratios, shapes, self.config.width)
        if self.level_embedding is not None:
            levels = [x + self.level_embedding[i] for i, x in enumerate(levels)]
        return torch.cat(levels, 1).expand(ratios.shape[0], -1, -1)

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
        place = self._place(padding, ratios, shapes)
        for layer in self.layers:
            scaled = positions
            if self.position_scale is not None:
                scaled = positions * self.position_scale(outputs[-1])
            outputs.append(layer(outputs[-1], scaled, place, padding, shapes))
            if self.fusion is not None:
                outputs[-1] = self.fusion.along(outputs)
        memory = outputs[-1] if self.fusion is None else self.fusion.after(outputs)
        return memory, outputs


class DeformableEncoder(TokenEncoder):
    """Tokens of all levels, told apart by a level embedding, sample all levels."""

    def __init__(self, config: DetectorConfig, encoder: DeformableEncoderConfig) -> None:
        layers = [DeformableEncoderLayer(config, encoder) for _ in range(encoder.layers)]
        super().__init__(config, list(layers))
        self.points = encoder.points
        if encoder.layers:
            self.level_embedding = nn.Parameter(torch.empty(config.neck.levels, config.width))
            nn.init.normal_(self.level_embedding)
        self._fuse(encoder)

    def _place(self, padding: Tensor, ratios: Tensor, shapes: LevelShapes) -> SamplingFrame:
        return sampling_frame(token_centers(ratios, shapes), ratios, shapes, self.points)


class DenseEncoder(TokenEncoder):
    """Tokens of a single level look at each other."""

    def __init__(self, config: DetectorConfig, encoder: DenseEncoderConfig) -> None:
        layers = [DenseEncoderLayer(config, encoder) for _ in range(encoder.layers)]
        super().__init__(config, list(layers))
        if encoder.layers and encoder.scaled_positions:
            self.position_scale = inner_mlp(config.width, config.width, config.width)
        self._fuse(encoder)

    def _place(self, padding: Tensor, ratios: Tensor, shapes: LevelShapes) -> list[GroupSpan]:
        return token_span(padding)
