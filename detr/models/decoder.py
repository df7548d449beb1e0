"""One decoder for every detector: all query groups in one call, references refined or fixed."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from detr.config import DetectorConfig
from detr.models.attention.deformable import (
    DeformableAttention,
    GroupedSelfAttention,
    GroupSpan,
    group_spans,
)
from detr.models.attention.dense import ConditionalCrossAttention, DenseCrossAttention, SpatialQuery
from detr.models.boxes import lift
from detr.models.geometry import SamplingFrame, join_frames, sampling_frame
from detr.models.layers import FeedForward, box_head, class_head, inner_mlp
from detr.models.queries.sources import QuerySource
from detr.models.structures import (
    Attention,
    DenseAttention,
    GroupOutput,
    Memory,
    QueryGroup,
    SampledAttention,
)

# Where queries look: sampled locations, a spatial query (conditional), or everywhere.
Place = SamplingFrame | Tensor | None


class DecoderLayer(nn.Module):
    """Post-norm layer: self-attention per group, cross-attention, feed-forward.

    Args:
        config: The detector.
        first: Whether this is the first layer.
    """

    def __init__(self, config: DetectorConfig, first: bool) -> None:
        super().__init__()
        conditional = config.attention == "conditional"
        self.self_attention = GroupedSelfAttention(
            config.width, config.heads, config.dropout, own_position=conditional
        )
        self.self_norm = nn.LayerNorm(config.width)
        self.cross_attention: nn.Module
        if config.attention == "deformable":
            self.cross_attention = DeformableAttention(
                config.width, config.heads, config.levels, config.points
            )
        elif conditional:
            self.cross_attention = ConditionalCrossAttention(config, first)
        else:
            self.cross_attention = DenseCrossAttention(config)
        self.cross_norm = nn.LayerNorm(config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.ffn = FeedForward(config)

    def forward(
        self,
        hidden: Tensor,
        position: Tensor,
        spans: list[GroupSpan],
        place: Place,
        memory: Memory,
        attention: bool,
    ) -> tuple[Tensor, Attention | None, list[Tensor | None]]:
        """``[B, N, D]`` to ``[B, N, D]``, with the cross-attention if asked for.

        Returns:
            Also the self-attention maps wanted, see :class:`GroupedSelfAttention`.
        """
        update, maps = self.self_attention(hidden, position, spans)
        hidden = self.self_norm(hidden + self.dropout(update))
        update, seen = self._look(hidden, position, place, memory, attention)
        hidden = self.cross_norm(hidden + self.dropout(update))
        return self.ffn(hidden), seen, maps

    def _look(
        self, hidden: Tensor, position: Tensor, place: Place, memory: Memory, attention: bool
    ) -> tuple[Tensor, Attention | None]:
        """Cross-attention of whichever kind."""
        cross = self.cross_attention
        if isinstance(cross, DeformableAttention):
            assert isinstance(place, SamplingFrame)
            update, locations, weights = cross(
                hidden + position, place, memory.tokens, memory.padding, memory.shapes
            )
            return update, SampledAttention(locations, weights)
        dense: tuple[Tensor, DenseAttention | None]
        if place is None:
            dense = cross(hidden, position, memory, attention)
        else:
            dense = cross(hidden, position, place, memory, attention)
        return dense


class Decoder(nn.Module):
    """Decoder layers with their class and box heads.

    Heads: one shared pair without refinement (Deformable DETR) or where the config shares them
    (official DINO, DAB-DETR), else a pair per layer. With mixed queries (DINO) or dense attention a
    last LayerNorm goes before the heads, while the running reference is updated from the un-normed
    output.
    """

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.config = config
        deformable, width = config.attention == "deformable", config.width
        depth = 1 if config.shared_decoder else config.decoder_layers
        self.layers = nn.ModuleList(DecoderLayer(config, i == 0) for i in range(depth))
        normed = config.query == "mixed" or not deformable
        self.norm = nn.LayerNorm(width) if normed else None
        self.spatial = SpatialQuery(config) if config.attention == "conditional" else None
        # DAB-Deformable-DETR rescales the position itself by the content, from layer 2 on.
        rescaled = config.query == "anchors" and deformable
        self.position_scale = inner_mlp(width, width, width) if rescaled else None
        shared = config.shared_heads or config.refine == "none"
        count = 1 if shared else config.decoder_layers
        self.class_heads = nn.ModuleList(class_head(config) for _ in range(count))
        # Without proposals the first boxes are small ones, but a shared head would shrink them in
        # every layer.
        small_start = (
            deformable
            and config.query in ("learned", "anchors")
            and (config.refine == "none" or not shared)
        )
        # DETR's boxes have nowhere else to differ by.
        placed = config.attention != "dense"
        self.box_heads = nn.ModuleList(
            box_head(width, placed, -2.0 if small_start and i == 0 else 0.0) for i in range(count)
        )

    def forward(
        self,
        memory: Memory,
        groups: list[QueryGroup],
        source: QuerySource,
        attention: bool = False,
        final_only: bool = False,
        self_attention: Collection[str] = (),
    ) -> list[GroupOutput]:
        """Runs all groups through all layers.

        Args:
            memory: The batch.
            groups: Distinct roles; adding one changes no other group's output (without dropout).
            source: Makes the position of groups that bring none.
            attention: Also return the cross-attention of every layer.
            final_only: Heads, and so outputs, for the last layer only (inference).
            self_attention: Roles of groups whose self-attention maps are also wanted.

        Returns:
            One output per group, in order.
        """
        config = self.config
        spans = group_spans(groups, self_attention)
        sizes = [group.content.shape[1] for group in groups]
        softmax = config.classification == "softmax"
        outputs = [GroupOutput(group, [], [], [], [], no_object=softmax) for group in groups]
        hidden = _join([group.content for group in groups])
        # The reference a layer starts from never carries gradient from a later layer's sampling;
        # look-forward-twice keeps the un-detached one for the loss boxes (DINO, section 3.5).
        references = [group.reference for group in groups]
        attached = references
        position = self._positions(groups, references, source, memory)
        last = config.decoder_layers - 1
        for index in range(config.decoder_layers):
            if index and source.position_follows_reference:
                position = self._positions(groups, references, source, memory)
            scaled = position
            if index and self.position_scale is not None:
                scaled = position * self.position_scale(hidden)
            place = self._place(index, hidden, references, memory)
            layer = self.layers[min(index, len(self.layers) - 1)]
            hidden, seen, maps = layer(hidden, scaled, spans, place, memory, attention)
            box_head_ = self.box_heads[min(index, len(self.box_heads) - 1)]
            running: Tensor | None = None
            if config.refine != "none" and index < last:
                running = box_head_(hidden)
            if index == last or not final_only:
                logits, boxes = self._predict(index, hidden, running, references, attached)
                _record(outputs, sizes, logits, boxes, hidden, references)
                if attention and seen is not None:
                    _record_attention(outputs, sizes, seen)
                for output, found in zip(outputs, maps, strict=True):
                    if found is not None:
                        output.self_attention.append(found)
            if running is not None:
                updated = (
                    running + _join([lift(r, config.logit_eps) for r in references])
                ).sigmoid()
                attached = _split(updated, sizes)
                references = _split(updated.detach(), sizes)
        return outputs

    def _place(self, index: int, hidden: Tensor, references: list[Tensor], memory: Memory) -> Place:
        """Where the queries of one layer look."""
        if self.spatial is not None:
            parts = zip(_split(hidden, [r.shape[1] for r in references]), references, strict=True)
            return _join([self.spatial(h, r, index == 0) for h, r in parts])
        if self.config.attention == "dense":
            return None
        return join_frames(
            [
                sampling_frame(r, memory.valid_ratios, memory.shapes, self.config.points)
                for r in references
            ]
        )

    def _predict(
        self,
        index: int,
        hidden: Tensor,
        running: Tensor | None,
        references: list[Tensor],
        attached: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Class logits ``[B, N, K]`` and boxes ``[B, N, 4]`` of one layer."""
        head = min(index, len(self.class_heads) - 1)
        normed = hidden if self.norm is None else self.norm(hidden)
        if running is not None and self.norm is None:
            # The box head saw this very tensor when it updated the reference.
            delta = running
        else:
            delta = self.box_heads[head](normed)
        twice = self.config.refine == "look_forward_twice"
        eps = self.config.logit_eps
        base = _join([lift(r, eps) for r in (attached if twice else references)])
        return self.class_heads[head](normed), (delta + base).sigmoid()

    @staticmethod
    def _positions(
        groups: list[QueryGroup], references: list[Tensor], source: QuerySource, memory: Memory
    ) -> Tensor:
        """``[B, N, D]`` positions of all groups: their own, or made from their references."""
        return _join(
            [
                source.position(reference, memory) if group.position is None else group.position
                for group, reference in zip(groups, references, strict=True)
            ]
        )


def _join(parts: list[Tensor]) -> Tensor:
    """Concatenation along the queries that leaves a single part alone."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _split(x: Tensor, sizes: list[int]) -> list[Tensor]:
    """The inverse of :func:`_join`."""
    return [x] if len(sizes) == 1 else list(torch.split(x, sizes, 1))


def _record(
    outputs: list[GroupOutput],
    sizes: list[int],
    logits: Tensor,
    boxes: Tensor,
    hidden: Tensor,
    references: list[Tensor],
) -> None:
    """Hands each group its part of one layer's results."""
    parts = zip(
        outputs,
        _split(logits, sizes),
        _split(boxes, sizes),
        _split(hidden, sizes),
        references,
        strict=True,
    )
    for output, group_logits, group_boxes, group_hidden, reference in parts:
        output.logits.append(group_logits)
        output.boxes.append(group_boxes)
        output.hidden.append(group_hidden)
        output.references.append(reference)


def _record_attention(outputs: list[GroupOutput], sizes: list[int], seen: Attention) -> None:
    """Hands each group its part of one layer's cross-attention."""
    if isinstance(seen, DenseAttention):
        for output, weights in zip(outputs, torch.split(seen.weights, sizes, 2), strict=True):
            output.attention.append(DenseAttention(weights))
        return
    parts = zip(outputs, _split(seen.locations, sizes), _split(seen.weights, sizes), strict=True)
    for output, locations, weights in parts:
        output.attention.append(SampledAttention(locations, weights))
