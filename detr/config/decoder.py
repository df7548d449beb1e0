"""Configs of the decoder: its cross-attention and how it refines references.

A further kind is a class here, named in :data:`CrossAttentionConfig` or :data:`RefinementConfig`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from detr.config.base import LayerStack, Part, Positive, SamplingPoints, Strict
from detr.points import Points


class AnyCrossAttentionConfig(Part):
    """What every kind of cross-attention says about itself."""

    single_level: ClassVar[bool] = True
    """Whether it works on one map only."""
    samples: ClassVar[bool] = False
    """Whether a query looks at a few places of the padded canvas, and not at every token."""
    needs_places: ClassVar[bool] = True
    """Whether it looks at the queries' references."""
    separates_positions: ClassVar[bool] = False
    """Whether content and position are projected apart, in self-attention as well."""
    first_layer_differs: ClassVar[bool] = False
    """Whether the first layer has weights that the others have not."""

    @property
    def sampling_points(self) -> Points:
        """Sampling points P per head and level, or of each level; 0 where nothing is sampled."""
        return 0

    @property
    def scales_positions(self) -> bool:
        """Whether positions are rescaled by the content."""
        return False

    @property
    def own_heads(self) -> int | None:
        """Its heads where they are not those of the other attentions."""
        return None


class DeformableCrossAttentionConfig(AnyCrossAttentionConfig):
    """Queries sample all levels around their references (Deformable DETR).

    Attributes:
        points: Sampling points P per head and level; a list gives each level its own number.
        scaled_positions: Positions are rescaled by the content from layer 2 on
            (DAB-Deformable-DETR).
        discrete: Samples are whole cells, and beyond the image those at its edge; offsets are then
            not trained (RT-DETRv2's discrete sampling).
        projections: Linear maps of what is sampled, before and after; without them heads sample
            channels of the memory itself (D-FINE).
        heads: Heads M, where they are more or fewer than the detector's (LW-DETR).
    """

    single_level: ClassVar[bool] = False
    samples: ClassVar[bool] = True

    kind: Literal["deformable"] = "deformable"
    points: SamplingPoints = 4
    scaled_positions: bool = False
    discrete: bool = False
    projections: bool = True
    heads: Positive | None = None

    @property
    def own_heads(self) -> int | None:
        """See the base class."""
        return self.heads

    @property
    def sampling_points(self) -> Points:
        """See the base class."""
        return self.points

    @property
    def scales_positions(self) -> bool:
        """See the base class."""
        return self.scaled_positions


class DenseCrossAttentionConfig(AnyCrossAttentionConfig):
    """Queries look at every token of one map (DETR)."""

    needs_places: ClassVar[bool] = False

    kind: Literal["dense"] = "dense"


class ConditionalCrossAttentionConfig(AnyCrossAttentionConfig):
    """Dense, but content is compared with content and place with place.

    Conditional DETR; with queries that have boxes, DAB-DETR's, which is also modulated by the
    boxes' sizes.
    """

    separates_positions: ClassVar[bool] = True
    first_layer_differs: ClassVar[bool] = True

    kind: Literal["conditional"] = "conditional"


CrossAttentionConfig = Annotated[
    DeformableCrossAttentionConfig | DenseCrossAttentionConfig | ConditionalCrossAttentionConfig,
    Field(discriminator="kind"),
]


class AnyRefinementConfig(Part):
    """What every kind of refinement says about itself."""

    moves: ClassVar[bool] = True
    """Whether each layer moves the references."""
    looks_forward_twice: ClassVar[bool] = False
    """Whether a layer's boxes also teach the layer before."""

    @property
    def heads_per_layer(self) -> bool:
        """Whether each layer has a class and a box head of its own."""
        return False

    @property
    def distribution(self) -> DistributionRefinementConfig | None:
        """How boxes are read off distributions, where they are."""
        return None


class NoRefinementConfig(AnyRefinementConfig):
    """References stay what they are, and all layers share one class and one box head."""

    moves: ClassVar[bool] = False

    kind: Literal["none"] = "none"


class MovingRefinementConfig(AnyRefinementConfig):
    """What refinements that move the references have in common.

    Attributes:
        shared_heads: One class and one box head for all decoder layers (DAB-DETR, official DINO)
            instead of a copy per layer.
    """

    shared_heads: bool = False

    @property
    def heads_per_layer(self) -> bool:
        """See the base class."""
        return not self.shared_heads


class DetachedRefinementConfig(MovingRefinementConfig):
    """Each layer moves the references, and no gradient follows (Deformable DETR)."""

    kind: Literal["detach"] = "detach"


class LookForwardTwiceConfig(MovingRefinementConfig):
    """Each layer moves the references, and its boxes teach the layer before (DINO section 3.5)."""

    looks_forward_twice: ClassVar[bool] = True

    kind: Literal["look_forward_twice"] = "look_forward_twice"


class QualityConfig(Strict):
    """How sure a distribution is of its edges, which is added to the class logits (D-FINE's LQE).

    Attributes:
        top: Largest probabilities of each edge that are looked at.
        width: Hidden channels of the network that looks.
    """

    top: Annotated[int, Field(ge=1, le=64)] = 4
    width: Annotated[int, Field(ge=1, le=8192)] = 64


class DistributionRefinementConfig(AnyRefinementConfig):
    """Each layer refines where the edges of a first box lie, as distributions (D-FINE section 4.1).

    The first layer says that box; every layer adds logits to those of the layers before.

    Attributes:
        bins: Bins R of an edge's distance; there are R + 1 places, from -2 to 2 times the reach.
        reach: How far the places go but for the two outermost, in sizes of the first box.
        curvature: How much nearer places are to each other at the middle; larger is flatter.
        quality: What the class logits learn from the distributions.
        shared_boxes: One box head for all layers (DEIMv2's smallest); class heads are a layer's
            own anyway.
    """

    kind: Literal["distribution"] = "distribution"
    bins: Annotated[int, Field(ge=4, le=1024, multiple_of=2)] = 32
    reach: Annotated[float, Field(gt=0, le=100)] = 0.5
    curvature: Annotated[float, Field(gt=0, le=1000)] = 4.0
    quality: QualityConfig = QualityConfig()
    shared_boxes: bool = False

    @model_validator(mode="after")
    def _places_enough(self) -> DistributionRefinementConfig:
        if self.quality.top > self.bins + 1:
            raise ValueError(
                f"quality.top {self.quality.top} of the {self.bins + 1} places that bins: "
                f"{self.bins} have"
            )
        return self

    @property
    def heads_per_layer(self) -> bool:
        """See the base class."""
        return True

    @property
    def distribution(self) -> DistributionRefinementConfig:
        """See the base class."""
        return self


RefinementConfig = Annotated[
    NoRefinementConfig
    | DetachedRefinementConfig
    | LookForwardTwiceConfig
    | DistributionRefinementConfig,
    Field(discriminator="kind"),
]


class DecoderConfig(LayerStack):
    """Decoder layers.

    Attributes:
        cross_attention: How queries look at the memory.
        refinement: How references follow the boxes from layer to layer.
        shared_layers: One set of weights for all layers (OD-DETR).
        final_norm: A layer norm before the heads, which the references never see (DETR, DINO).
        gated: What the cross-attention found and what was known are each weighed by a gate before
            they are added and normed (D-FINE).
        evaluated_layers: How many of the layers answer after training; the others are there to
            teach. ``None`` for all.
        norm_twice: Classes and masks are read after that norm was applied once more, boxes are not
            (Mask DINO's code).
        norm: What norms do to a query: ``layer`` takes its mean off and divides by the deviation,
            ``rms`` divides by the root of its mean square alone (DEIMv2).
    """

    cross_attention: CrossAttentionConfig = DeformableCrossAttentionConfig()
    refinement: RefinementConfig = NoRefinementConfig()
    shared_layers: bool = False
    final_norm: bool = False
    gated: bool = False
    evaluated_layers: Annotated[int, Field(ge=1)] | None = None
    norm_twice: bool = False
    norm: Literal["layer", "rms"] = "layer"

    @model_validator(mode="after")
    def _alike(self) -> DecoderConfig:
        if self.shared_layers and self.refinement.heads_per_layer:
            raise ValueError(
                "shared_layers repeats one layer, so heads per layer mean nothing: set "
                "refinement.shared_heads"
            )
        if self.norm_twice and not self.final_norm:
            raise ValueError("norm_twice repeats the final norm: set final_norm to true")
        if self.shared_layers and self.cross_attention.first_layer_differs:
            raise ValueError(
                "shared_layers needs layers that are alike; the first one of cross_attention: "
                f"{self.cross_attention.kind} is not"
            )
        if self.evaluated_layers is not None and self.evaluated_layers > self.layers:
            raise ValueError(f"evaluated_layers {self.evaluated_layers} of {self.layers} layers")
        return self

    @property
    def answering_layers(self) -> int:
        """Number of layers whose last one answers after training."""
        return self.layers if self.evaluated_layers is None else self.evaluated_layers

    @property
    def own_layers(self) -> int:
        """Number of layers with weights of their own."""
        return 1 if self.shared_layers else self.layers

    @property
    def own_heads(self) -> int:
        """Number of class heads, and of box heads unless :attr:`own_box_heads` says otherwise."""
        return self.layers if self.refinement.heads_per_layer else 1

    @property
    def own_box_heads(self) -> int:
        """Number of box heads, which may be one where each layer has a class head."""
        edges = self.refinement.distribution
        return 1 if edges is not None and edges.shared_boxes else self.own_heads
