"""What a detector is made of: one validated, frozen config for every architecture."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, model_validator

from detr.config.backbone import (
    AnyBackboneConfig,
    AnyNeckConfig,
    BackboneConfig,
    NeckConfig,
    PositionsConfig,
)
from detr.config.base import Positive, Strict
from detr.config.decoder import DecoderConfig
from detr.config.encoder import DeformableEncoderConfig, EncoderConfig
from detr.config.heads import HeadsConfig
from detr.config.queries import LearnedQueriesConfig, QueriesConfig
from detr.points import Points

# In the order they run; the encoder's proposals, with their heads, belong to the queries.
PartName = Literal["backbone", "neck", "encoder", "queries", "decoder", "heads", "denoising"]


# Pixels per cell of the map that masks are predicted on.
MASK_STRIDE = 4


class DetectorConfig(Strict):
    """A detection transformer, part by part.

    Parts of which there are several kinds say which with ``kind``; options of a kind exist on that
    kind only.

    Attributes:
        num_classes: Number of foreground classes K.
        width, attention_heads: Model width D and heads M of every attention.
        mlp_activation: Between the linear layers of every MLP of heads and positions (DEIM:
            ``silu``).
        dropout: In encoder and decoder.
        backbone: The image's maps.
        neck: Brings them to the width and adds coarser levels.
        positions: Of the image plane.
        encoder: What happens to the maps before the decoder.
        queries: Where the object queries come from.
        decoder: What they learn from the memory.
        heads: What is said of each.
        detections: How many (query, class) pairs the post-processing keeps.
        nms: Those that overlap a better one of their class by more than this IoU are dropped
            afterwards, wherever the model finds objects (Stable-DINO: 0.8); ``None`` drops none.
    """

    num_classes: Annotated[int, Field(ge=1, le=100_000)]
    width: Annotated[int, Field(ge=8, le=8192)] = 256
    attention_heads: Positive = 8
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    mlp_activation: Literal["relu", "silu"] = "relu"
    backbone: AnyBackboneConfig = BackboneConfig()
    neck: AnyNeckConfig = NeckConfig()
    positions: PositionsConfig = PositionsConfig()
    encoder: EncoderConfig = DeformableEncoderConfig()
    queries: QueriesConfig = LearnedQueriesConfig()
    decoder: DecoderConfig = DecoderConfig()
    heads: HeadsConfig = HeadsConfig()
    detections: Positive = 100
    nms: Annotated[float, Field(gt=0, le=1)] | None = None

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels per cell of each level."""
        return self.neck.strides(self.backbone.strides)

    @property
    def mask_strides(self) -> tuple[int, ...]:
        """Of the backbone's maps that masks need and the encoder does not take."""
        finest = self.heads.masks is not None and MASK_STRIDE not in self.backbone.strides
        return (MASK_STRIDE,) if finest else ()

    @property
    def map_width(self) -> int:
        """Channels of the maps that the neck hands to the encoder."""
        return self.encoder.map_width(self.width)

    @property
    def attention_sizes(self) -> tuple[int, int, Points]:
        """Heads, channels of a head, and points per level of every deformable attention."""
        heads = self.sampling_heads
        return heads, self.width // heads, self.sampling_points

    @property
    def sampling_heads(self) -> int:
        """Heads M of every deformable attention."""
        return self.decoder.cross_attention.own_heads or self.attention_heads

    @property
    def sampling_points(self) -> Points:
        """Sampling points P per head and level of every deformable attention; 0 without any."""
        return self.encoder.sampling_points or self.decoder.cross_attention.sampling_points

    @model_validator(mode="after")
    def _consistent(self) -> DetectorConfig:
        for reason in self._contradictions():
            raise ValueError(reason)
        return self

    def _contradictions(self) -> Iterator[str]:
        """Parts that cannot go together, and why."""
        widths = {"width": self.width}
        if self.map_width != self.width:
            widths["encoder.width"] = self.map_width
        for name, width in widths.items():
            if width % self.attention_heads:
                yield f"{name} {width} is not a multiple of attention_heads {self.attention_heads}"
            if width % 4:
                yield f"{name} {width} is not a multiple of 4 (2-D sine embedding)"
        if self.width % self.sampling_heads:
            yield (
                f"width {self.width} is not a multiple of decoder.cross_attention.heads "
                f"{self.sampling_heads}"
            )
        yield from self._level_contradictions()
        queries, cross = self.queries, self.decoder.cross_attention
        refinement, classes = self.decoder.refinement, self.heads.classes
        if cross.needs_places and not queries.has_places:
            yield (
                f"decoder.cross_attention: {cross.kind} looks at places, and queries that all "
                "refer to the middle have none"
            )
        if queries.has_places and not cross.needs_places:
            yield (
                f"queries: {queries.kind} have places, at which decoder.cross_attention: "
                f"{cross.kind} never looks; set it to conditional or deformable, or take learned "
                "queries with reference: center"
            )
        if queries.has_boxes and not refinement.moves and not queries.boxes_may_stay:
            yield (
                f"queries: {queries.kind} start from boxes and need decoder.refinement: detach or "
                "look_forward_twice"
            )
        if refinement.moves and not queries.has_boxes and not cross.samples:
            yield (
                f"decoder.refinement: {refinement.kind} needs decoder.cross_attention: deformable, "
                "or queries: anchors"
            )
        if refinement.distribution is not None and self.heads.boxes.kind != "offset":
            yield f"decoder.refinement: {refinement.kind} needs heads.boxes: offset"
        if queries.learned_positions and not self.positions.normalized:
            yield (
                f"queries: {queries.kind} have positions in parts of the image: set "
                "positions.normalized to true"
            )
        offsets = self.decoder.own_heads == 1 and refinement.distribution is None
        if queries.predict_first and not (offsets and self.decoder.final_norm):
            yield (
                f"queries: {queries.kind} are judged by the decoder's heads: set "
                "decoder.refinement.shared_heads and decoder.final_norm to true"
            )
        if queries.starts_from_masks and self.heads.masks is None:
            yield (
                f"queries: {queries.kind} start from masks and need heads.masks; or set "
                "queries.initial_boxes to predicted"
            )
        if queries.in_groups and (self.heads.masks or refinement.distribution):
            other = "heads.masks" if self.heads.masks else f"decoder.refinement: {refinement.kind}"
            yield f"queries: {queries.kind} have several groups, and {other} has a loss for one"
        points = {self.encoder.sampling_points, cross.sampling_points} - {0}
        if len(points) > 1:
            ours, theirs = map(_told, (self.encoder.sampling_points, cross.sampling_points))
            yield (
                f"encoder.points {ours} and decoder.cross_attention.points {theirs} differ: an "
                "exported graph has one attention operator for both"
            )
        if self.encoder.sampling_points and self.sampling_heads != self.attention_heads:
            yield (
                f"decoder.cross_attention.heads {self.sampling_heads} and the encoder's "
                f"{self.attention_heads} differ: an exported graph has one attention operator for "
                "both"
            )
        if classes.no_object and (queries.from_proposals or queries.noise is not None):
            yield (
                f"heads.classes: {classes.kind} has no proposals or denoising, which are sigmoid's"
            )

    def _level_contradictions(self) -> Iterator[str]:
        """What does not fit the number of levels."""
        levels = self.neck.levels
        yield from self.neck.contradictions(self.backbone.strides)
        if self.mask_strides and self.backbone.kind != "timm":
            yield f"heads.masks: a backbone of kind {self.backbone.kind} has no map of stride 4"
        if self.encoder.halves and any(b != 2 * a for a, b in pairwise(self.strides)):
            yield (
                f"encoder: {self.encoder.kind} needs levels that are half as fine each, not of "
                f"strides {', '.join(map(str, self.strides))}"
            )
        parts = {"encoder": self.encoder, "decoder.cross_attention": self.decoder.cross_attention}
        for place, part in parts.items():
            points = part.sampling_points
            if not isinstance(points, int) and len(points) != levels:
                yield f"{place}.points: {_told(points)} are of {len(points)} levels, not {levels}"
        single = {place: part.kind for place, part in parts.items() if part.single_level}
        for place, kind in single.items():
            if levels != 1:
                yield (
                    f"{place}: {kind} works on one map: set neck.levels to 1 and backbone.strides "
                    "to (32,), or (16,) for a dilated last stage"
                )
            if self.queries.from_proposals:
                yield (
                    f"queries: {self.queries.kind} come from proposals per level and need {place}: "
                    "deformable"
                )


def _told(points: Points) -> str:
    """Numbers of points as a file has them."""
    return str(points if isinstance(points, int) else list(points))
