"""Configs of what makes the maps: backbone and neck."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from detr.config.base import Strict, Word


class BackboneConfig(Strict):
    """A timm ``features_only`` backbone.

    Attributes:
        name: timm model name (``resnet18``, ``resnet50``, ...).
        strides: Strides of the feature maps taken, finest first (8, 16, 32 are C3, C4, C5).
        norm: ``frozen`` keeps batch-norm statistics and scales fixed (needs pretrained weights);
            ``train`` trains them (from scratch).
        pretrained: Path of a ``.safetensors`` file or ``hub:NAME`` (a timm tag); ``None`` starts
            from random weights.
        options: Further keyword arguments of timm's ``create_model`` (``channels``, ``layers``).
        map_norm: A layer norm over the channels of each map (detectors on Swin and ConvNeXt).
        frozen_stages: How many leading stages (stem, stage 1, ...) take no gradient.
        first_projection: A ResNet's first block has a convolution on its shortcut although nothing
            asks for one (PaddlePaddle's ResNet-18-vd and 34-vd, which RT-DETR takes). It starts
            as the identity, so weights of a ResNet without it mean what they meant.
    """

    name: Word = "resnet50"
    strides: Annotated[tuple[int, ...], Field(min_length=1)] = (8, 16, 32)
    norm: Literal["frozen", "train"] = "train"
    pretrained: Word | None = None
    options: dict[str, Any] = {}
    map_norm: bool = False
    frozen_stages: Annotated[int, Field(ge=0, le=100)] = 0
    first_projection: bool = False

    @field_validator("options")
    @classmethod
    def _plain(cls, options: dict[str, Any]) -> dict[str, Any]:
        """Tuples become lists, so that a config equals itself after a trip through JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}

    @field_validator("strides")
    @classmethod
    def _ascending(cls, strides: tuple[int, ...]) -> tuple[int, ...]:
        if list(strides) != sorted(set(strides)):
            raise ValueError(f"{', '.join(map(str, strides))}: name each once, finest first")
        return strides


class NeckConfig(Strict):
    """What brings the backbone's maps to one width and adds coarser levels.

    Attributes:
        levels: Number of feature levels V; levels beyond the backbone's maps are stride-2 convs.
        group_norm: A group norm after each convolution (Deformable DETR); DETR has none.
        batch_norm: A batch norm after each convolution, in place of its bias (RT-DETR).
    """

    levels: Annotated[int, Field(ge=1, le=8)] = 4
    group_norm: bool = True
    batch_norm: bool = False

    @model_validator(mode="after")
    def _one_norm(self) -> NeckConfig:
        if self.group_norm and self.batch_norm:
            raise ValueError(
                "batch_norm takes the place of the group norm: set group_norm to false"
            )
        return self


class PositionsConfig(Strict):
    """The 2-D sine embedding of the image plane.

    Attributes:
        temperature: Ratio of the lowest to the highest wavelength; DETR 10000, DINO 20.
        offset: Added to the cell number, which counts from 1; Deformable DETR -0.5, DETR and
            DINO 0, RT-DETR -1.
        normalized: Cells are counted in parts of the image, so that the last one is at 2 pi;
            otherwise one radian each, and all sines come before all cosines (RT-DETR).
    """

    temperature: Annotated[float, Field(ge=1e-3, le=1e9)] = 10000.0
    offset: Annotated[float, Field(ge=-1e3, le=1e3)] = -0.5
    normalized: bool = True
