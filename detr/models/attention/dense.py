"""Dense cross-attention: every query looks at every token of one map."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from detr.config import DetectorConfig
from detr.models.attention.cross import CrossAttention, Place, Places, join, split
from detr.models.attention.deformable import split_heads
from detr.models.layers import inner_mlp
from detr.models.queries.position import YXWH, reference_embedding
from detr.models.structures import Attention, DenseAttention, Memory


def _attend(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor, dropout: float, maps: bool
) -> tuple[Tensor, DenseAttention | None]:
    """Attention of split heads over the tokens inside the image.

    Args:
        query: ``[B, M, N, C]``.
        key: ``[B, M, S, C]``.
        value: ``[B, M, S, D / M]``.
        padding: ``[B, S]`` bool, true for tokens that are not looked at.
        dropout: Of the weights.
        maps: Also return the weights; the fused kernel does not give them.

    Returns:
        ``[B, N, D]`` and, if asked for, the weights before dropout.
    """
    allowed = ~padding[:, None, None]
    if not maps:
        out = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=allowed, dropout_p=dropout
        )
        return out.transpose(1, 2).flatten(2), None
    scores = (query @ key.transpose(2, 3)) / math.sqrt(query.shape[-1])
    weights = scores.float().masked_fill(~allowed, -math.inf).softmax(-1)
    used = functional.dropout(weights, dropout) if dropout else weights
    out = used.to(value.dtype) @ value
    return out.transpose(1, 2).flatten(2), DenseAttention(weights)


class DenseCrossAttention(CrossAttention):
    """DETR's: positions are added to queries and keys."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        width = config.width
        self.heads, self.dropout = config.attention_heads, config.dropout
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.output = nn.Linear(width, width), nn.Linear(width, width)
        # As GroupedSelfAttention's: Xavier over the stacked projections.
        bound = math.sqrt(6 / (4 * width))
        for projection in (self.query, self.key, self.value):
            nn.init.uniform_(projection.weight, -bound, bound)
            nn.init.zeros_(projection.bias)
        nn.init.xavier_uniform_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def look(
        self, hidden: Tensor, position: Tensor, place: Place, memory: Memory, maps: bool
    ) -> tuple[Tensor, Attention | None]:
        """See the base class."""
        update, attention = self(hidden, position, memory, maps)
        return update, attention

    def forward(
        self, hidden: Tensor, position: Tensor, memory: Memory, maps: bool = False
    ) -> tuple[Tensor, DenseAttention | None]:
        """``[B, N, D]`` content and position to ``[B, N, D]``."""
        query = self.query(hidden + position)
        key, value = self.key(memory.tokens + memory.positions), self.value(memory.tokens)
        query, key, value = (split_heads(x, self.heads) for x in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        out, attention = _attend(query, key, value, memory.padding, dropout, maps)
        return self.output(out), attention


class ConditionalCrossAttention(CrossAttention):
    """Content is compared with content and place with place (Conditional DETR, section 3.3).

    Each head's query is its content half followed by its spatial half, and so is the key. Only the
    first layer, whose content says nothing yet, also adds positions to the content halves.

    Args:
        config: The detector.
        first: Whether this is the first decoder layer.
    """

    def __init__(self, config: DetectorConfig, first: bool) -> None:
        super().__init__()
        width = config.width
        self.heads, self.dropout = config.attention_heads, config.dropout
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.output = nn.Linear(width, width), nn.Linear(width, width)
        self.spatial_query, self.spatial_key = nn.Linear(width, width), nn.Linear(width, width)
        self.position = nn.Linear(width, width) if first else None
        for projection in self.children():
            assert isinstance(projection, nn.Linear)
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def look(
        self, hidden: Tensor, position: Tensor, place: Place, memory: Memory, maps: bool
    ) -> tuple[Tensor, Attention | None]:
        """See the base class."""
        update, attention = self(hidden, position, place, memory, maps)
        return update, attention

    def forward(
        self,
        hidden: Tensor,
        position: Tensor,
        spatial: Tensor,
        memory: Memory,
        maps: bool = False,
    ) -> tuple[Tensor, DenseAttention | None]:
        """Cross-attention.

        Args:
            hidden: ``[B, N, D]`` content.
            position: ``[B, N, D]``, read by the first layer only.
            spatial: ``[B, N, D]``, see :class:`SpatialQuery`.
            memory: The batch.
            maps: Also return the attention weights.

        Returns:
            ``[B, N, D]`` and, if asked for, the weights.
        """
        query, key = self.query(hidden), self.key(memory.tokens)
        place = self.spatial_key(memory.positions)
        if self.position is not None:
            query, key = query + self.position(position), key + place
        spatial = self.spatial_query(spatial)
        query = torch.cat([split_heads(x, self.heads) for x in (query, spatial)], -1)
        key = torch.cat([split_heads(x, self.heads) for x in (key, place)], -1)
        value = split_heads(self.value(memory.tokens), self.heads)
        dropout = self.dropout if self.training else 0.0
        out, attention = _attend(query, key, value, memory.padding, dropout, maps)
        return self.output(out), attention


class SpatialQuery(Places):
    """Where a query looks: the sine code of its center, reshaped by its content.

    Conditional DETR (section 3.3): the code is multiplied by an MLP of the content, except in the
    first layer. DAB-DETR (section 4.3) also stretches the x and y halves by the ratio of a size
    predicted from the content to the anchor's.
    """

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.width = config.width
        self.scale = inner_mlp(config.width, config.width, config.width)
        sized = config.queries.has_boxes
        self.size = inner_mlp(config.width, config.width, 2) if sized else None

    def of(self, index: int, hidden: Tensor, references: list[Tensor], memory: Memory) -> Place:
        """See the base class."""
        parts = zip(split(hidden, [r.shape[1] for r in references]), references, strict=True)
        return join([self(h, r, index == 0) for h, r in parts])

    def forward(self, hidden: Tensor, references: Tensor, first: bool) -> Tensor:
        """The spatial query ``[B, N, D]``.

        Args:
            hidden: ``[B, N, D]`` content.
            references: ``[B, N, R]``; sizes matter only where R is 4.
            first: Whether this is the first decoder layer.
        """
        half = self.width // 2
        code = reference_embedding(references[..., :2], YXWH[:2], half)
        if not first:
            code = code * self.scale(hidden)
        if self.size is None or references.shape[-1] == 2:
            return code
        ratio = self.size(hidden).sigmoid() / references[..., 2:]
        width, height = ratio.split(1, -1)
        return torch.cat((code[..., :half] * height, code[..., half:] * width), -1)
