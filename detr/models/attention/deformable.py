"""Attention: multi-scale deformable cross-attention and grouped self-attention."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from detr.models.attention.cross import CrossAttention, Place, Places
from detr.models.attention.ms_deform_attn import ms_deform_attn
from detr.models.geometry import SamplingFrame, join_frames, sampling_frame, whole_cells
from detr.models.layers import TokenLinear
from detr.models.structures import (
    Attention,
    LevelShapes,
    Memory,
    QueryGroup,
    SampledAttention,
)
from detr.points import Points, level_points, sample_axes, unequal


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention (Deformable DETR, equation 3).

    Args:
        width: Model width D.
        heads: M.
        levels: V.
        points: P per head and level, or of each level.
        discrete: Sample whole cells; offsets then have no gradient and are not trained.
        projections: Linear maps of values and output; otherwise there are none.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        levels: int,
        points: Points,
        discrete: bool = False,
        projections: bool = True,
    ) -> None:
        super().__init__()
        self.discrete = discrete
        self.heads, self.levels, self.points = heads, levels, points
        samples = sum(level_points(points, levels))
        self.sampling_offsets = nn.Linear(width, heads * samples * 2)
        self.attention_weights = nn.Linear(width, heads * samples)
        self.value_proj = TokenLinear(width) if projections else None
        self.output_proj = nn.Linear(width, width) if projections else nn.Identity()
        self._reset()
        if discrete:
            self.sampling_offsets.requires_grad_(False)

    def _reset(self) -> None:
        """Head m looks along compass direction m, point p at distance p + 1, all equally."""
        nn.init.zeros_(self.sampling_offsets.weight)
        angles = torch.arange(self.heads, dtype=torch.float32) * (2 * math.pi / self.heads)
        compass = torch.stack((angles.cos(), angles.sin()), -1)
        compass = compass / compass.abs().amax(-1, keepdim=True)
        counts = level_points(self.points, self.levels)
        steps = torch.cat([torch.arange(1, count + 1, dtype=torch.float32) for count in counts])
        bias = compass[:, None] * steps[None, :, None]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(bias.flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            if not isinstance(projection, nn.Linear):
                continue
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        frame: SamplingFrame,
        tokens: Tensor,
        padding: Tensor,
        shapes: LevelShapes,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Samples the tokens around each query's reference.

        Args:
            query: ``[B, N, D]`` content plus position.
            frame: Reference of each query on each level.
            tokens: ``[B, S, D]``.
            padding: ``[B, S]``; padded tokens have value zero.
            shapes: (height, width) of the levels.

        Returns:
            Output ``[B, N, D]``, locations ``[B, N, M, V, P, 2]`` and weights ``[B, N, M, V, P]``;
            ``[B, N, M, K, 2]`` and ``[B, N, M, K]`` where the levels' numbers of points differ.
        """
        value = tokens if self.value_proj is None else self.value_proj(tokens, shapes)
        # In place where no gradient is kept, as :class:`detr.models.layers.InnerReLU`.
        keep = torch.is_grad_enabled() or value is tokens
        fill = value.masked_fill if keep else value.masked_fill_
        value = fill(padding[..., None], 0.0)
        value = value.unflatten(-1, (self.heads, -1))
        offsets = self.sampling_offsets(query)
        axes = sample_axes(self.points, self.levels)
        offsets = offsets.unflatten(-1, (self.heads, *axes, 2))
        weights = self.attention_weights(query)
        weights = weights.unflatten(-1, (self.heads, math.prod(axes))).softmax(-1)
        if len(axes) > 1:
            weights = weights.unflatten(-1, axes)
        locations = torch.addcmul(frame.center[:, :, None], offsets, frame.unit[:, :, None])
        if self.discrete:
            locations = whole_cells(locations, frame.ratios, shapes, self.points)
        sampled = ms_deform_attn(value, shapes, locations, weights, unequal(self.points))
        return self.output_proj(sampled), locations, weights


class DeformableCrossAttention(DeformableAttention, CrossAttention):
    """Queries sample the memory around their references; see the base classes."""

    def look(
        self, hidden: Tensor, position: Tensor, place: Place, memory: Memory, maps: bool
    ) -> tuple[Tensor, Attention | None]:
        """See the base class; the attention is at hand anyway."""
        update, locations, weights = self(
            hidden + position, place, memory.tokens, memory.padding, memory.shapes
        )
        return update, SampledAttention(locations, weights, self.points)


class SamplingPlaces(Places):
    """Queries look around their references, on every level.

    Args:
        points: Sampling points P per level, or of each level.
    """

    def __init__(self, points: Points) -> None:
        super().__init__()
        self.points = points

    def of(self, index: int, hidden: Tensor, references: list[Tensor], memory: Memory) -> Place:
        """See the base class."""
        return join_frames(
            [
                sampling_frame(reference, memory.valid_ratios, memory.shapes, self.points)
                for reference in references
            ]
        )


class KeyRange(NamedTuple):
    """Positions ``start`` to ``stop`` of the concatenated queries."""

    start: int
    stop: int


@dataclass(frozen=True)
class GroupSpan:
    """Where a group lies among the concatenated queries and what it may attend to.

    Attributes:
        own: The group's range.
        seen: Range of the one other group it sees.
        mask: ``[B or 1, 1, N, N_keys]`` bool, true where attention is allowed; ``None`` if
            everything is. Keys are the group's own followed by the seen group's.
        wanted: Whether somebody asked for the group's attention map.
        blocks: Equal blocks that cannot see each other and that no mask tells apart.
    """

    own: KeyRange
    seen: KeyRange | None
    mask: Tensor | None
    wanted: bool = False
    blocks: int = 1


def group_spans(groups: list[QueryGroup], wanted: Collection[str] = ()) -> list[GroupSpan]:
    """Lays out query groups for one decoder call.

    Equivalent to one block-diagonal mask over all queries, but no attention between groups is ever
    computed, so a further group costs its own attention only.

    Args:
        groups: Distinct roles.
        wanted: Roles of groups whose attention maps are wanted.

    Raises:
        ValueError: Where roles repeat, ``sees`` names no group, or blocks do not divide a group.
    """
    ranges: dict[str, KeyRange] = {}
    start = 0
    for group in groups:
        if group.role in ranges:
            raise ValueError(f"two query groups have the role {group.role!r}")
        ranges[group.role] = KeyRange(start, start + group.content.shape[1])
        start += group.content.shape[1]
    by_role = {group.role: group for group in groups}
    spans = []
    for group in groups:
        if group.sees is not None and group.sees not in ranges:
            raise ValueError(f"group {group.role!r} sees {group.sees!r}, which is not in the call")
        seen = None if group.sees is None else by_role[group.sees]
        # Blocks of queries that all count become a batch: no attention between them is computed.
        apart = group.padding is None and seen is None and group.role not in wanted
        _check_blocks(group)
        spans.append(
            GroupSpan(
                own=ranges[group.role],
                seen=None if group.sees is None else ranges[group.sees],
                mask=None if apart else _allowed(group, seen),
                wanted=group.role in wanted,
                blocks=group.blocks if apart else 1,
            )
        )
    return spans


def _check_blocks(group: QueryGroup) -> None:
    """Raises ValueError where blocks do not divide a group."""
    size = group.content.shape[1]
    if size % group.blocks:
        raise ValueError(f"group {group.role!r}: {size} queries in {group.blocks} equal blocks")


def _allowed(group: QueryGroup, seen: QueryGroup | None) -> Tensor | None:
    """The attention mask of one group, see :class:`GroupSpan`."""
    padded = group.padding is not None or (seen is not None and seen.padding is not None)
    if group.blocks == 1 and not padded:
        return None
    size = group.content.shape[1]
    number = torch.arange(size, device=group.content.device)
    block = number // (size // group.blocks)
    allowed = (block[:, None] == block[None])[None, None]
    if group.padding is not None:
        # A filler query sees itself: a row without any key would turn into NaN.
        itself = (number[:, None] == number[None])[None, None]
        allowed = (allowed & ~group.padding[:, None, None]) | itself
    if seen is None:
        return allowed
    other = torch.ones(1, 1, size, seen.content.shape[1], dtype=torch.bool, device=number.device)
    if seen.padding is not None:
        other = other & ~seen.padding[:, None, None]
    batch = max(allowed.shape[0], other.shape[0])
    return torch.cat((allowed.expand(batch, -1, -1, -1), other.expand(batch, -1, -1, -1)), -1)


class GroupedSelfAttention(nn.Module):
    """Multi-head self-attention in which each group sees itself and at most one other group.

    Queries and keys get the position added, values do not.

    Args:
        width: Model width D.
        heads: M.
        dropout: Of the attention weights.
        own_position: The position has its own projection before it is added (Conditional DETR)
            instead of the content's.
    """

    def __init__(self, width: int, heads: int, dropout: float, own_position: bool = False) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query_key = nn.Linear(width, 2 * width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        self.position = nn.Linear(width, 2 * width) if own_position else None
        # Xavier over the stacked [3D, D] projection, as DETR's: the bound is sqrt(6 / 4D). Where
        # content and position are apart, each [D, D] projection has its own.
        bound = math.sqrt(6 / ((2 if own_position else 4) * width))
        for projection in (self.query_key, self.value, self.position):
            if projection is not None:
                nn.init.uniform_(projection.weight, -bound, bound)
                nn.init.zeros_(projection.bias)
        nn.init.xavier_uniform_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(
        self, hidden: Tensor, position: Tensor, spans: list[GroupSpan]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """``[B, N, D]`` content and position to ``[B, N, D]``.

        Returns:
            The output, and per span the softmax map ``[B, M, N, N_keys]`` before dropout where it
            is wanted: those spans cannot use the fused kernel.
        """
        if self.position is None:
            both = self.query_key(hidden + position)
        else:
            both = self.query_key(hidden) + self.position(position)
        query, key = both.chunk(2, -1)
        query, key, value = (split_heads(x, self.heads) for x in (query, key, self.value(hidden)))
        dropout = self.dropout if self.training else 0.0
        parts = []
        maps: list[Tensor | None] = []
        for span in spans:
            keys, values = key[:, :, slice(*span.own)], value[:, :, slice(*span.own)]
            if span.seen is not None:
                keys = torch.cat((keys, key[:, :, slice(*span.seen)]), 2)
                values = torch.cat((values, value[:, :, slice(*span.seen)]), 2)
            queries = query[:, :, slice(*span.own)]
            if span.blocks > 1:
                maps.append(None)
                parts.append(_apart(queries, keys, values, span.blocks, dropout))
            elif span.wanted:
                attention = _attention_map(queries, keys, span.mask)
                maps.append(attention)
                parts.append(functional.dropout(attention, dropout) @ values)
            else:
                maps.append(None)
                parts.append(
                    functional.scaled_dot_product_attention(
                        queries, keys, values, attn_mask=span.mask, dropout_p=dropout
                    )
                )
        joined = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
        out: Tensor = self.output(joined.transpose(1, 2).flatten(2))
        return out, maps


def _apart(queries: Tensor, keys: Tensor, values: Tensor, blocks: int, dropout: float) -> Tensor:
    """Attention within each of some equal blocks, ``[B, M, N, D / M]`` to the same."""
    query, key, value = (
        torch.unflatten(x, 2, (blocks, -1)).transpose(1, 2).flatten(0, 1)
        for x in (queries, keys, values)
    )
    found = functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
    return torch.unflatten(found, 0, (-1, blocks)).transpose(1, 2).flatten(2, 3)


def _attention_map(queries: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
    """``[B, M, N, N_keys]`` softmax of the scaled products; zero where the mask forbids."""
    scores = queries @ keys.transpose(-1, -2) / math.sqrt(queries.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """``[B, N, D]`` to ``[B, M, N, D / M]``."""
    return torch.unflatten(x, -1, (heads, -1)).transpose(1, 2)


def token_span(padding: Tensor) -> list[GroupSpan]:
    """Self-attention of every token with those inside the image.

    Args:
        padding: ``[B, S]`` bool, true outside the image.
    """
    whole = KeyRange(0, padding.shape[1])
    return [GroupSpan(own=whole, seen=None, mask=~padding[:, None, None])]
