"""Which cross-attention a config asks for; a further kind is one entry here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from detr.config import (
    ConditionalCrossAttentionConfig,
    DeformableCrossAttentionConfig,
    DenseCrossAttentionConfig,
    DetectorConfig,
)
from detr.models.attention.cross import CrossAttention, Everywhere, Places
from detr.models.attention.deformable import DeformableCrossAttention, SamplingPlaces
from detr.models.attention.dense import (
    ConditionalCrossAttention,
    DenseCrossAttention,
    SpatialQuery,
)


class _Kind(NamedTuple):
    """Modules of one kind: a layer's attention, and what tells all layers where to look."""

    attention: Callable[[DetectorConfig, Any, bool], CrossAttention]
    places: Callable[[DetectorConfig, Any], Places]


_KINDS: dict[type, _Kind] = {
    DeformableCrossAttentionConfig: _Kind(
        lambda config, cross, _: DeformableCrossAttention(
            config.width,
            config.sampling_heads,
            config.neck.levels,
            cross.points,
            cross.discrete,
            cross.projections,
        ),
        lambda _, cross: SamplingPlaces(cross.points),
    ),
    DenseCrossAttentionConfig: _Kind(
        lambda config, *_: DenseCrossAttention(config), lambda *_: Everywhere()
    ),
    ConditionalCrossAttentionConfig: _Kind(
        lambda config, _, first: ConditionalCrossAttention(config, first),
        lambda config, _: SpatialQuery(config),
    ),
}


def build_cross_attention(config: DetectorConfig, first: bool) -> CrossAttention:
    """A new cross-attention of one decoder layer.

    Args:
        config: The detector.
        first: Whether it is the first layer's.
    """
    cross = config.decoder.cross_attention
    return _KINDS[type(cross)].attention(config, cross, first)


def build_places(config: DetectorConfig) -> Places:
    """What tells the layers of a detector's decoder where to look."""
    cross = config.decoder.cross_attention
    return _KINDS[type(cross)].places(config, cross)
