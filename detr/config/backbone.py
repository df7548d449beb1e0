"""Configs of what makes the maps: backbone and neck.

A further kind of neck is a class here, named in :data:`AnyNeckConfig`; vision transformers are in
:mod:`detr.config.vit`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from detr.config.base import Part, Strict, Word, usual_kind
from detr.config.vit import Dinov2BackboneConfig, Dinov3BackboneConfig, VitBackboneConfig


class BackboneConfig(Part):
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

    kind: Literal["timm"] = "timm"
    name: Word = "resnet50"
    strides: Annotated[tuple[int, ...], Field(min_length=1)] = (8, 16, 32)
    norm: Literal["frozen", "train"] = "train"
    pretrained: Word | None = None
    options: dict[str, Any] = {}
    map_norm: bool = False
    frozen_stages: Annotated[int, Field(ge=0, le=100)] = 0
    first_projection: bool = False

    @property
    def body(self) -> tuple[Any, ...]:
        """What tells one network from another, whichever of its maps are taken."""
        return self.kind, self.name, self.options

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


AnyBackboneConfig = Annotated[
    BackboneConfig | VitBackboneConfig | Dinov2BackboneConfig | Dinov3BackboneConfig,
    Field(discriminator="kind"),
    usual_kind("timm"),
]


class NeckConfig(Part):
    """What brings the backbone's maps to one width and adds coarser levels.

    Attributes:
        levels: Number of feature levels V; levels beyond the backbone's maps are stride-2 convs.
        group_norm: A group norm after each convolution (Deformable DETR); DETR has none.
        batch_norm: A batch norm after each convolution, in place of its bias (RT-DETR).
        pooled: Levels beyond the backbone's maps are means of 3 x 3 cells of the level before,
            mixed by a 1x1 convolution and SiLU (DEIMv2's smallest).
    """

    of_maps: ClassVar[bool] = True
    """Whether the leading levels are the backbone's maps, one each."""

    kind: Literal["levels"] = "levels"
    levels: Annotated[int, Field(ge=1, le=8)] = 4
    group_norm: bool = True
    batch_norm: bool = False
    pooled: bool = False

    @model_validator(mode="after")
    def _one_norm(self) -> NeckConfig:
        if self.group_norm and self.batch_norm:
            raise ValueError(
                "batch_norm takes the place of the group norm: set group_norm to false"
            )
        if self.pooled and not self.batch_norm:
            raise ValueError("pooled levels have batch norms: set batch_norm to true")
        return self

    def strides(self, maps: tuple[int, ...]) -> tuple[int, ...]:
        """Pixels per cell of each level, of those of the backbone's maps."""
        further = range(1, self.levels - len(maps) + 1)
        return (*maps, *(maps[-1] * 2**i for i in further))

    def contradictions(self, maps: tuple[int, ...]) -> Iterator[str]:
        """What does not fit the strides of the backbone's maps."""
        if len(set(maps)) < len(maps):
            yield (
                f"neck: levels makes one of each map, and the backbone's {len(maps)} have one "
                "stride: set neck.kind to projector"
            )
        if self.levels < len(maps):
            yield f"neck.levels {self.levels} is less than the backbone's maps {len(maps)}"
        if self.levels >= 5 and 4 not in maps:
            yield f"neck.levels {self.levels} needs the stride-4 map: backbone.strides 4, 8, 16, 32"


class ProjectorNeckConfig(Part):
    """What makes levels of several maps of one stride (LW-DETR section 3.1's projector).

    Each level resamples the maps, joins them and sends them through a C2f block.

    Attributes:
        scales: Cells of each level's side, in parts of a map's, finest first: 2, 1 or 0.5.
        blocks: Pairs of convolutions in each C2f block.
        expansion: Channels between, in parts of the width.
        norm: After each convolution: over the batch (LW-DETR) or over a cell's channels (RF-DETR).
        norm_eps: Added to variances; of the layer norms (RF-DETR's code 1e-6, transformers 1e-5).
    """

    of_maps: ClassVar[bool] = False
    """See :class:`NeckConfig`."""

    kind: Literal["projector"] = "projector"
    scales: Annotated[tuple[float, ...], Field(min_length=1)] = (1.0,)
    blocks: Annotated[int, Field(ge=1, le=100)] = 3
    expansion: Annotated[float, Field(gt=0, le=4)] = 0.5
    norm: Literal["batch", "layer"] = "batch"
    norm_eps: Annotated[float, Field(gt=0, lt=0.1)] = 1e-6

    @field_validator("scales")
    @classmethod
    def _descending(cls, scales: tuple[float, ...]) -> tuple[float, ...]:
        if strange := set(scales) - {2.0, 1.0, 0.5}:
            raise ValueError(f"{min(strange)} is none of 2, 1 and 0.5")
        if list(scales) != sorted(set(scales), reverse=True):
            raise ValueError(f"{', '.join(map(str, scales))}: name each once, finest first")
        return scales

    @property
    def levels(self) -> int:
        """Number of feature levels V."""
        return len(self.scales)

    def strides(self, maps: tuple[int, ...]) -> tuple[int, ...]:
        """Pixels per cell of each level, of those of the backbone's maps."""
        return tuple(round(maps[-1] / scale) for scale in self.scales)

    def contradictions(self, maps: tuple[int, ...]) -> Iterator[str]:
        """What does not fit the strides of the backbone's maps."""
        if len(set(maps)) > 1:
            yield (
                f"neck: projector joins maps of one stride, not of {', '.join(map(str, maps))}: "
                "take a backbone of kind vit or dinov2, or one of backbone.strides"
            )
        if 2.0 in self.scales and maps[-1] % 2:
            yield f"neck.scales: 2 of cells of {maps[-1]} pixels is no whole number of pixels"


AnyNeckConfig = Annotated[
    NeckConfig | ProjectorNeckConfig, Field(discriminator="kind"), usual_kind("levels")
]


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
