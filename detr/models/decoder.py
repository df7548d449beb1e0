"""One decoder for every detector: all query groups in one call, references refined or fixed."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from detr.config import DetectorConfig
from detr.models.attention.build import build_cross_attention, build_places
from detr.models.attention.cross import Place, join, split
from detr.models.attention.deformable import GroupedSelfAttention, GroupSpan, group_spans
from detr.models.heads.boxes import box_head
from detr.models.heads.classes import class_head
from detr.models.heads.masks import mask_heads
from detr.models.heads.shared import Heads
from detr.models.layers import FeedForward, Gate, inner_mlp, norm_of
from detr.models.queries.sources import QuerySource
from detr.models.refinement import Course, Layer, build_refiner, edge_head
from detr.models.structures import (
    Attention,
    DenseAttention,
    FirstBoxes,
    GroupOutput,
    InitialAnswer,
    Memory,
    QueryGroup,
    SampledAttention,
)


class DecoderLayer(nn.Module):
    """Post-norm layer: self-attention per group, cross-attention, feed-forward.

    Args:
        config: The detector.
        first: Whether this is the first layer.
    """

    def __init__(self, config: DetectorConfig, first: bool) -> None:
        super().__init__()
        norm = norm_of(config.decoder)
        self.self_attention = GroupedSelfAttention(
            config.width,
            config.attention_heads,
            config.dropout,
            own_position=config.decoder.cross_attention.separates_positions,
        )
        self.self_norm = norm(config.width)
        self.cross_attention = build_cross_attention(config, first)
        self.gate: Gate | None = None
        if config.decoder.gated:
            self.gate = Gate(config.width, norm)
        else:
            self.cross_norm = norm(config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.ffn = FeedForward(config.width, config.decoder, config.dropout, norm)

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
        update, seen = self.cross_attention.look(hidden, position, place, memory, attention)
        update = self.dropout(update)
        if self.gate is None:
            hidden = self.cross_norm(hidden + update)
        else:
            hidden = self.gate(hidden, update)
        return self.ffn(hidden), seen, maps


class Decoder(nn.Module):
    """Decoder layers with their class and box heads.

    Heads: one shared pair, a pair per layer, or a class head per layer beside one box head. A last
    norm, where there is one, goes before the heads, while the running reference is updated from the
    un-normed output.
    """

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.config = config.decoder
        self.classes = config.heads.classes
        decoder, width = config.decoder, config.width
        self.layers = nn.ModuleList(DecoderLayer(config, i == 0) for i in range(decoder.own_layers))
        self.norm = norm_of(decoder)(width) if decoder.final_norm else None
        self.spatial = build_places(config)
        scaled = decoder.cross_attention.scales_positions
        self.position_scale = inner_mlp(width, width, width) if scaled else None
        self.class_heads = nn.ModuleList(class_head(config) for _ in range(decoder.own_heads))
        self.box_heads = nn.ModuleList(_box_heads(config))
        self.refiner = build_refiner(config)
        self.mask_heads = nn.ModuleList(mask_heads(config))
        self.predict_first = config.queries.predict_first

    @property
    def heads(self) -> Heads:
        """Those of the first layer, with the norm before them."""
        masks = self.mask_heads[0] if len(self.mask_heads) else None
        return Heads(self.norm, self.class_heads[0], self.box_heads[0], masks)

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
            final_only: Heads, and so outputs, for the last layer that answers only (inference).
            self_attention: Roles of groups whose self-attention maps are also wanted.

        Returns:
            One output per group, in order.
        """
        depth = self.config.answering_layers if final_only else self.config.layers
        spans = group_spans(groups, self_attention)
        sizes = [group.content.shape[1] for group in groups]
        no_object = self.classes.no_object
        outputs = [GroupOutput(group, [], [], [], [], no_object=no_object) for group in groups]
        hidden = join([group.content for group in groups])
        has_masks = memory.pixels is not None and len(self.mask_heads) > 0
        if has_masks:
            for output in outputs:
                output.pixels = memory.pixels
        if self.predict_first and self.training and not final_only:
            _record_initial(outputs, sizes, self.heads, hidden)
        course = Course([group.reference for group in groups])
        position = self._positions(groups, course.references, source, memory)
        last = depth - 1
        for index in range(depth):
            if index and source.position_follows_reference and self.config.refinement.moves:
                position = self._positions(groups, course.references, source, memory)
            scaled = position
            if index and self.position_scale is not None:
                scaled = position * self.position_scale(hidden)
            references = course.references
            place = self.spatial.of(index, hidden, references, memory)
            layer = self.layers[min(index, len(self.layers) - 1)]
            hidden, seen, maps = layer(hidden, scaled, spans, place, memory, attention)
            answers = index == last or not final_only
            normed = self.norm(hidden) if answers and self.norm is not None else hidden
            head = self.box_heads[min(index, len(self.box_heads) - 1)]
            boxes = self.refiner.step(
                course, Layer(index, head, hidden, normed, index == last, answers)
            )
            if answers and boxes is not None:
                judged = normed
                if self.norm is not None and self.config.norm_twice:
                    judged = self.norm(normed)
                logits = self.class_heads[min(index, len(self.class_heads) - 1)](judged)
                distribution = self.config.refinement.distribution
                if index == 0 and course.first is not None and distribution is not None:
                    parts = split(logits, sizes), split(course.first, sizes)
                    for output, said, boxes_said in zip(outputs, *parts, strict=True):
                        output.first = FirstBoxes(said, boxes_said, distribution)
                if (quality := self.refiner.quality(course, index)) is not None:
                    logits = logits + quality
                _record(outputs, sizes, logits, boxes, hidden, references)
                if course.edges is not None:
                    for output, edges in zip(outputs, split(course.edges, sizes), strict=True):
                        output.edges.append(edges)
                if has_masks:
                    mask_head = self.mask_heads[min(index, len(self.mask_heads) - 1)]
                    told = split(mask_head(judged), sizes)
                    for output, masks in zip(outputs, told, strict=True):
                        output.masks.append(masks)
                if attention and seen is not None:
                    _record_attention(outputs, sizes, seen)
                for output, found in zip(outputs, maps, strict=True):
                    if found is not None:
                        output.self_attention.append(found)
        return outputs

    @staticmethod
    def _positions(
        groups: list[QueryGroup], references: list[Tensor], source: QuerySource, memory: Memory
    ) -> Tensor:
        """``[B, N, D]`` positions of all groups: their own, or made from their references."""
        return join(
            [
                source.position(reference, memory) if group.position is None else group.position
                for group, reference in zip(groups, references, strict=True)
            ]
        )


def _box_heads(config: DetectorConfig) -> list[nn.Module]:
    """One shared box head or one per layer, with the first values each starts from."""
    decoder, queries = config.decoder, config.queries
    if (edges := decoder.refinement.distribution) is not None:
        return [edge_head(config, edges) for _ in range(decoder.own_box_heads)]
    # Where no proposal says how large, the first boxes are small ones (Deformable DETR); but a
    # shared head would shrink them in every layer that moves them.
    small_start = (
        decoder.cross_attention.samples
        and not queries.from_proposals
        and (decoder.refinement.heads_per_layer or not decoder.refinement.moves)
    )
    # DETR's boxes have nowhere else to differ by.
    placed = queries.has_places
    return [
        box_head(config.width, placed, -2.0 if small_start and i == 0 else 0.0)
        for i in range(decoder.own_heads)
    ]


def _record_initial(
    outputs: list[GroupOutput], sizes: list[int], heads: Heads, content: Tensor
) -> None:
    """Hands each group what the heads say of the queries that enter the first layer."""
    logits, masks = heads.of(content)
    told = [None] * len(sizes) if masks is None else split(masks, sizes)
    for output, own_logits, own_masks in zip(outputs, split(logits, sizes), told, strict=True):
        output.initial = InitialAnswer(own_logits, output.group.reference, own_masks)


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
        split(logits, sizes),
        split(boxes, sizes),
        split(hidden, sizes),
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
    parts = zip(outputs, split(seen.locations, sizes), split(seen.weights, sizes), strict=True)
    for output, locations, weights in parts:
        output.attention.append(SampledAttention(locations, weights, seen.points))
