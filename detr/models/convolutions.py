"""Convolution blocks of hybrid encoders, which training keeps in parts and inference joins.

Whatever can be joined has a method ``fuse``, which changes the module in place and leaves what it
computes in evaluation mode, up to rounding; :func:`fused` calls them all.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import fuse_conv_bn_eval

from detr.models.layers import NormOf

M = TypeVar("M", bound=nn.Module)


class Fusible(nn.Module, ABC):
    """A module that can be written with fewer operators once it is trained."""

    @abstractmethod
    def fuse(self) -> None:
        """Joins what is inside, in place; afterwards it can no longer be trained as before."""


class SiLU(nn.SiLU):
    """SiLU, in place unless gradients are kept (as :class:`detr.models.layers.InnerReLU`)."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape."""
        return functional.silu(input, inplace=not torch.is_grad_enabled())


class ConvNorm(Fusible):
    """Convolution that keeps the map's size at stride 1, norm, SiLU.

    Args:
        inputs, outputs: Channels.
        kernel: Odd side of the kernel.
        stride: Of the convolution.
        activate: Whether SiLU follows.
        groups: Of the convolution.
        norm: Makes the norm, usually over the batch.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int = 1,
        activate: bool = True,
        groups: int = 1,
        norm: NormOf = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False
        )
        self.norm = norm(outputs)
        self.activation = SiLU() if activate else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """``[B, inputs, H, W]`` to ``[B, outputs, H / stride, W / stride]``, rounded up."""
        out: Tensor = self.activation(self.norm(self.conv(x)))
        return out

    def fuse(self) -> None:
        """See the base class: a batch norm becomes part of the convolution."""
        if isinstance(self.norm, nn.BatchNorm2d):
            self.conv = fuse_conv_bn_eval(self.conv, self.norm)
            self.norm = nn.Identity()


class RepVGGBlock(Fusible):
    """3x3 and 1x1 convolution of one map, added (Ding et al. 2021, RepVGG, without its identity).

    Args:
        width: Channels.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.large = ConvNorm(width, width, 3, activate=False)
        self.small: ConvNorm | None = ConvNorm(width, width, 1, activate=False)
        self.activation = SiLU()

    def forward(self, x: Tensor) -> Tensor:
        """``[B, width, H, W]`` to the same."""
        total = self.large(x)
        if self.small is not None:
            total = total + self.small(x)
        out: Tensor = self.activation(total)
        return out

    @torch.no_grad()
    def fuse(self) -> None:
        """See the base class: a 1x1 convolution is a 3x3 one whose rim is zero."""
        if self.small is None:
            return
        large, small = self.large, self.small
        large.fuse()
        small.fuse()
        assert large.conv.bias is not None and small.conv.bias is not None
        large.conv.weight.add_(functional.pad(small.conv.weight, (1, 1, 1, 1)))
        large.conv.bias.add_(small.conv.bias)
        self.small = None


class CSPBlock(nn.Module):
    """RepVGG blocks beside a shortcut (RT-DETR, figure 4).

    Args:
        inputs, outputs: Channels.
        inner: Channels between.
        blocks: Number of RepVGG blocks.
    """

    def __init__(self, inputs: int, inner: int, outputs: int, blocks: int) -> None:
        super().__init__()
        self.way = ConvNorm(inputs, inner, 1)
        self.shortcut = ConvNorm(inputs, inner, 1)
        self.blocks = nn.Sequential(*(RepVGGBlock(inner) for _ in range(blocks)))
        self.output = ConvNorm(inner, outputs, 1) if inner != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """``[B, inputs, H, W]`` to ``[B, outputs, H, W]``."""
        out: Tensor = self.output(self.blocks(self.way(x)) + self.shortcut(x))
        return out


class LayersBeside(nn.Module):
    """Ways one upon the other, whose results all lie beside the input's halves.

    Args:
        first: Makes the two halves of ``channels`` each.
        ways: Each takes what the one before has made.
        last: Joins all of it.
        channels: Of a half.
    """

    def __init__(
        self, first: ConvNorm, ways: Iterable[nn.Module], last: ConvNorm, channels: int
    ) -> None:
        super().__init__()
        self.channels = channels
        self.first = first
        self.ways = nn.ModuleList(ways)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        """``[B, inputs, H, W]`` to ``[B, outputs, H, W]``."""
        seen = list(self.first(x).split(self.channels, 1))
        for way in self.ways:
            seen.append(way(seen[-1]))
        out: Tensor = self.last(torch.cat(seen, 1))
        return out


class GelanBlock(LayersBeside):
    """Two CSP blocks, one upon the other, whose results all lie beside the input (GELAN).

    Wang et al. 2024, YOLOv9, figure 4, as D-FINE has it.

    Args:
        inputs, outputs: Channels; a first convolution makes two halves of the outputs' each.
        inner: Channels of each CSP block.
        blocks: Number of RepVGG blocks in each.
        smooth: Whether a 3x3 convolution ends each way.
    """

    def __init__(
        self, inputs: int, inner: int, outputs: int, blocks: int, smooth: bool = True
    ) -> None:
        first = ConvNorm(inputs, 2 * outputs, 1)
        ways = [
            nn.Sequential(
                CSPBlock(before, inner, inner, blocks),
                *([ConvNorm(inner, inner, 3)] if smooth else []),
            )
            for before in (outputs, inner)
        ]
        last = ConvNorm(2 * outputs + 2 * inner, outputs, 1)
        super().__init__(first, ways, last, outputs)


class C2fBlock(LayersBeside):
    """Pairs of convolutions, one upon the other, whose results all lie beside each other (YOLOv8).

    Args:
        inputs, outputs: Channels.
        inner: Channels of each way.
        blocks: Number of pairs.
        norm: After each convolution.
    """

    def __init__(self, inputs: int, inner: int, outputs: int, blocks: int, norm: NormOf) -> None:
        first = ConvNorm(inputs, 2 * inner, 1, norm=norm)
        ways = [
            nn.Sequential(*(ConvNorm(inner, inner, 3, norm=norm) for _ in range(2)))
            for _ in range(blocks)
        ]
        last = ConvNorm((2 + blocks) * inner, outputs, 1, norm=norm)
        super().__init__(first, ways, last, inner)


def separable_downsample(width: int) -> nn.Sequential:
    """Half the size: channels are mixed, then every one is narrowed alone (SCDown of YOLOv10).

    Args:
        width: Channels.
    """
    return nn.Sequential(
        ConvNorm(width, width, 1, activate=False),
        ConvNorm(width, width, 3, stride=2, activate=False, groups=width),
    )


def pooled_downsample(width: int) -> nn.Sequential:
    """Half the size: means of 3 x 3 cells, then channels are mixed (DEIMv2's LiteEncoder).

    Args:
        width: Channels.
    """
    return nn.Sequential(nn.AvgPool2d(3, stride=2, padding=1), ConvNorm(width, width, 1))


def fused(module: M) -> M:
    """A copy of a module in which everything :class:`Fusible` is fused; itself without any."""
    if not any(isinstance(inner, Fusible) for inner in module.modules()):
        return module
    copied = copy.deepcopy(module)
    for inner in list(copied.modules()):
        if isinstance(inner, Fusible):
            inner.fuse()
    return copied
