"""Configs of encoders. A further kind is a class here, named in :data:`EncoderConfig`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from detr.config.base import LayerStack, Part, SamplingPoints
from detr.points import Points


class AnyEncoderConfig(LayerStack, Part):
    """What every kind of encoder says about itself.

    Attributes:
        layers: Number of its transformer layers.
    """

    single_level: ClassVar[bool] = False
    """Whether it works on one map only."""
    halves: ClassVar[bool] = False
    """Whether each level must be half as fine as the one before."""

    layers: Annotated[int, Field(ge=0, le=100)] = 6

    @property
    def sampling_points(self) -> Points:
        """Sampling points P per head and level, or of each level; 0 where nothing is sampled."""
        return 0

    @property
    def fuses_every_layer(self) -> bool:
        """Whether the memory changes its meaning with the number of layers."""
        return False

    @property
    def nested(self) -> bool:
        """Whether each layer's output is the memory of a shallower encoder of the same weights."""
        return False

    def map_width(self, width: int) -> int:
        """Channels of the maps it takes, in a detector of a width."""
        return width

    def alone(self, layers: int) -> dict[str, Any]:
        """What to change for one of so many layers that takes a memory for its maps."""
        return {"layers": layers}


class TokenEncoderConfig(AnyEncoderConfig):
    """What encoders that work on tokens have in common.

    Attributes:
        layers: Their number; 0 hands the projected maps to the decoder.
        fusion: How the decoder's memory combines the encoder's layers (Stable-DINO section 4.3), or
            ``None`` for the last alone.
    """

    fusion: Literal["simple", "u", "dense"] | None = None

    @model_validator(mode="after")
    def _something_to_fuse(self) -> TokenEncoderConfig:
        if self.fusion is not None and self.layers == 0:
            raise ValueError(f"fusion: {self.fusion} needs encoder layers to fuse")
        return self

    @property
    def fuses_every_layer(self) -> bool:
        """See the base class."""
        return self.fusion in ("u", "dense")

    @property
    def nested(self) -> bool:
        """See the base class."""
        return self.fusion is None

    def alone(self, layers: int) -> dict[str, Any]:
        """See the base class; it joins nothing."""
        return {"layers": layers, "fusion": None}


class DeformableEncoderConfig(TokenEncoderConfig):
    """Deformable attention over the tokens of all levels (Deformable DETR).

    Attributes:
        points: Sampling points P per head and level; a list gives each level its own number.
    """

    kind: Literal["deformable"] = "deformable"
    points: SamplingPoints = 4

    @property
    def sampling_points(self) -> Points:
        """See the base class."""
        return self.points if self.layers else 0


class DenseEncoderConfig(TokenEncoderConfig):
    """Every token looks at every token of one map (DETR).

    Attributes:
        scaled_positions: Positions are rescaled by the content of every layer's input (DAB-DETR).
    """

    single_level: ClassVar[bool] = True

    kind: Literal["dense"] = "dense"
    scaled_positions: bool = False


class AnyHybridEncoderConfig(AnyEncoderConfig):
    """What encoders of maps have in common.

    Attributes:
        layers: Of the attention within the coarsest map; 0 leaves the convolutions alone.
        width: Channels E of the maps within it; ``None`` for the detector's width.
        expansion: Channels of the blocks that fuse two maps, in parts of E.
        blocks: RepVGG blocks in each of their ways.
    """

    halves: ClassVar[bool] = True

    layers: Annotated[int, Field(ge=0)] = 1
    activation: Literal["relu", "prelu", "gelu", "silu", "swiglu"] = "gelu"
    width: Annotated[int, Field(ge=8, le=65536)] | None = None
    expansion: Annotated[float, Field(gt=0, le=4)] = 1.0
    blocks: Annotated[int, Field(ge=1, le=100)] = 3

    def map_width(self, width: int) -> int:
        """See the base class."""
        return width if self.width is None else self.width

    def alone(self, layers: int) -> dict[str, Any]:
        """See the base class; a memory has the detector's width."""
        return {"layers": layers, "width": None}


class HybridEncoderConfig(AnyHybridEncoderConfig):
    """Attention within the coarsest map, CSP blocks across scales (RT-DETR section 4.2)."""

    kind: Literal["hybrid"] = "hybrid"


class AnyGelanEncoderConfig(AnyHybridEncoderConfig):
    """What encoders of GELAN blocks, of two ways each, have in common.

    Attributes:
        join: How a block sees two maps: ``beside`` each other, or as their ``sum`` (DEIMv2).
        smooth: A 3x3 convolution ends each way of a block (DEIMv2 S to X: not).
    """

    join: Literal["beside", "sum"] = "beside"
    smooth: bool = True


class GelanEncoderConfig(AnyGelanEncoderConfig):
    """The same with GELAN blocks, and lighter steps between scales (D-FINE)."""

    kind: Literal["gelan"] = "gelan"


class LiteEncoderConfig(AnyGelanEncoderConfig):
    """The same where coarser maps learn their means, and finer ones are narrowed by means (DEIMv2).

    The smallest sizes have no attention beside it.
    """

    kind: Literal["lite"] = "lite"
    layers: Annotated[int, Field(ge=0)] = 0
    join: Literal["beside", "sum"] = "sum"


EncoderConfig = Annotated[
    DeformableEncoderConfig
    | DenseEncoderConfig
    | HybridEncoderConfig
    | GelanEncoderConfig
    | LiteEncoderConfig,
    Field(discriminator="kind"),
]
