"""Configs of backbones that are vision transformers."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from detr.config.base import Part


class AnyVitConfig(Part):
    """What vision transformers have in common.

    Attributes:
        patch: Pixels per cell, in height and width.
        width: Channels of a token.
        heads: Of their attention.
        taps: After how many blocks a map is taken, each; there are no blocks after the last.
        drop_path: How often the last block's branches are skipped in training; earlier ones' less,
            in proportion (stochastic depth).
    """

    norm: ClassVar[Literal["train"]] = "train"
    """There is no batch norm to freeze."""
    pretrained: ClassVar[None] = None
    """Weights come with the whole detector's."""

    patch: Annotated[int, Field(ge=1, le=256)] = 16
    width: Annotated[int, Field(ge=8, le=8192)] = 384
    heads: Annotated[int, Field(ge=1, le=1024)] = 12
    taps: Annotated[tuple[Annotated[int, Field(ge=1, le=100)], ...], Field(min_length=1)] = (12,)
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _consistent(self) -> AnyVitConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        _in_order("taps", self.taps)
        return self

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return self.taps[-1]


def _in_order(name: str, numbers: tuple[int, ...]) -> None:
    """Raises ValueError where numbers come twice or later ones first."""
    if list(numbers) != sorted(set(numbers)):
        raise ValueError(f"{name}: {list(numbers)}: name each once, first ones first")


class WindowedVitConfig(AnyVitConfig):
    """Windows in most blocks, maps of one stride.

    Attributes:
        side: The learned positions are a grid of so many rows and columns, which is stretched over
            the canvas.
        windows: The canvas is cut into so many rows and columns of windows.
        windowed: Numbers of the blocks, from 0, that look at a token's own window; the others look
            at all windows.
    """

    class_token: ClassVar[bool] = False
    """Whether a token of no place goes with every window, and a last norm follows each tap."""
    antialias: ClassVar[bool] = False
    """Whether positions are averaged where there are fewer cells than positions."""
    first_scale: ClassVar[float] = 1.0
    """What a block's branches are multiplied by at first."""

    side: Annotated[int, Field(ge=1, le=1024)] = 14
    windows: Annotated[int, Field(ge=1, le=64)] = 4
    windowed: tuple[Annotated[int, Field(ge=0)], ...] = ()

    @model_validator(mode="after")
    def _windows_consistent(self) -> WindowedVitConfig:
        _in_order("windowed", self.windowed)
        if self.windowed and self.windowed[-1] >= self.depth:
            raise ValueError(
                f"windowed: {self.windowed[-1]}: there are blocks 0 to {self.depth - 1}"
            )
        return self

    @property
    def body(self) -> tuple[Any, ...]:
        """What tells one network from another, whichever of its maps are taken."""
        return self.kind, self.patch, self.width, self.heads, self.side, self.windows

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels per cell of each map."""
        return (self.patch,) * len(self.taps)


class VitBackboneConfig(WindowedVitConfig):
    """LW-DETR's: a plain ViT as CAE v2 pretrains it."""

    first_scale: ClassVar[float] = 0.1

    kind: Literal["vit"] = "vit"


class Dinov2BackboneConfig(WindowedVitConfig):
    """RF-DETR's: DINOv2 with windows, each of which has its copy of the class token."""

    class_token: ClassVar[bool] = True
    antialias: ClassVar[bool] = True

    kind: Literal["dinov2"] = "dinov2"
    heads: Annotated[int, Field(ge=1, le=1024)] = 6
    side: Annotated[int, Field(ge=1, le=1024)] = 37


class Dinov3BackboneConfig(AnyVitConfig):
    """DEIMv2's: DINOv3, whose three maps an adapter brings to three strides and adds details to.

    Every block looks at all of the image; places are told by rotations (RoPE).

    Attributes:
        ffn: Hidden channels of a block's feed-forward network.
        activation: Within it; ``swiglu`` is SiLU of one linear map times another.
        registers: Tokens of no place beside the class token.
        first_scale: What a block's branches are multiplied by at first; ``None`` for no such scale.
        final_norm: A last norm follows each tap.
        norm_eps: Added to variances.
        detail: Channels of the adapter's first convolution; its maps have two, four and four times
            as many.
    """

    kind: Literal["dinov3"] = "dinov3"
    heads: Annotated[int, Field(ge=1, le=1024)] = 6
    taps: Annotated[
        tuple[Annotated[int, Field(ge=1, le=100)], ...], Field(min_length=3, max_length=3)
    ] = (6, 9, 12)
    ffn: Annotated[int, Field(ge=1, le=65536)] = 1536
    activation: Literal["gelu", "swiglu"] = "gelu"
    registers: Annotated[int, Field(ge=0, le=64)] = 4
    first_scale: Annotated[float, Field(gt=0, le=1)] | None = 1e-5
    final_norm: bool = True
    norm_eps: Annotated[float, Field(gt=0, lt=0.1)] = 1e-5
    detail: Annotated[int, Field(ge=1, le=1024)] = 16

    @model_validator(mode="after")
    def _turns(self) -> Dinov3BackboneConfig:
        if self.width // self.heads % 4:
            raise ValueError(
                f"width {self.width} of heads {self.heads}: rotations in two directions need a "
                "multiple of 4 channels in a head"
            )
        return self

    @property
    def body(self) -> tuple[Any, ...]:
        """See the other kinds."""
        network = self.ffn, self.activation, self.registers, self.final_norm, self.detail
        return self.kind, self.patch, self.width, self.heads, *network

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels per cell of each map."""
        return 8, 16, 32
