"""Configs of encoders. A further kind is a class here, named in :data:`EncoderConfig`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from detr.config.base import LayerStack, Part


class TokenEncoderConfig(LayerStack, Part):
    """What encoders that work on tokens have in common.

    Attributes:
        layers: Their number; 0 hands the projected maps to the decoder.
        fusion: How the decoder's memory combines the encoder's layers (Stable-DINO section 4.3), or
            ``None`` for the last alone.
    """

    single_level: ClassVar[bool] = False
    """Whether it works on one map only."""

    layers: Annotated[int, Field(ge=0, le=100)] = 6
    fusion: Literal["simple", "u", "dense"] | None = None

    @model_validator(mode="after")
    def _something_to_fuse(self) -> TokenEncoderConfig:
        if self.fusion is not None and self.layers == 0:
            raise ValueError(f"fusion: {self.fusion} needs encoder layers to fuse")
        return self

    @property
    def sampling_points(self) -> int:
        """Sampling points P per head and level; 0 where nothing is sampled."""
        return 0

    @property
    def fuses_every_layer(self) -> bool:
        """Whether the memory changes its meaning with the number of layers."""
        return self.fusion in ("u", "dense")


class DeformableEncoderConfig(TokenEncoderConfig):
    """Deformable attention over the tokens of all levels (Deformable DETR).

    Attributes:
        points: Sampling points P per head and level.
    """

    kind: Literal["deformable"] = "deformable"
    points: Annotated[int, Field(ge=1, le=64)] = 4

    @property
    def sampling_points(self) -> int:
        """See the base class."""
        return self.points


class DenseEncoderConfig(TokenEncoderConfig):
    """Every token looks at every token of one map (DETR).

    Attributes:
        scaled_positions: Positions are rescaled by the content of every layer's input (DAB-DETR).
    """

    single_level: ClassVar[bool] = True

    kind: Literal["dense"] = "dense"
    scaled_positions: bool = False


EncoderConfig = Annotated[DeformableEncoderConfig | DenseEncoderConfig, Field(discriminator="kind")]
