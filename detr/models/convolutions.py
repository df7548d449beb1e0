"""Convolution blocks of hybrid encoders, which training keeps in parts and inference joins.

Whatever can be joined has a method ``fuse``, which changes the module in place and leaves what it
computes in evaluation mode, up to rounding; :func:`detr.models.fusing.fused` calls them all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import fuse_conv_bn_eval

from detr.models.layers import NormOf


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


class ConvNormOfTwo(Fusible):
    """1x1 convolution over two maps that lie beside each other, norm, SiLU.

    They are never laid there: each goes through its channels of the kernel, and the results are
    added. A first map of half the size is enlarged afterwards, which changes no value, so that its
    part of the convolution sees a quarter of the cells.

    Args:
        inputs: Channels of both maps together; each has half of them.
        outputs: Channels.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(outputs)
        self.activation = SiLU()
        # The first map's, once fused; ``conv`` is then the second's.
        self.first: nn.Conv2d | None = None

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """``[B, inputs / 2, ...]`` of size H, W or half of it, and of size H, W.

        Returns:
            ``[B, outputs, H, W]``.
        """
        if self.first is None:
            left, right = self.conv.weight.chunk(2, 1)
            first, second = functional.conv2d(first, left), functional.conv2d(second, right)
        else:
            first, second = self.first(first), self.conv(second)
        out: Tensor = self.activation(self.norm(second + enlarged(first, second)))
        return out

    @torch.no_grad()
    def fuse(self) -> None:
        """See the base class; each map also gets a convolution of its own."""
        assert isinstance(self.norm, nn.BatchNorm2d)
        joined = fuse_conv_bn_eval(self.conv, self.norm)
        left, right = joined.weight.chunk(2, 1)
        self.first = pointwise(left, None)
        self.conv = pointwise(right, joined.bias)
        self.norm = nn.Identity()


def pointwise(kernel: Tensor, bias: Tensor | None) -> nn.Conv2d:
    """A 1x1 convolution of given weights ``[outputs, inputs, 1, 1]`` and ``[outputs]``."""
    outputs, inputs = kernel.shape[:2]
    conv = nn.Conv2d(inputs, outputs, 1, bias=bias is not None)
    conv.weight = nn.Parameter(kernel.detach().clone())
    conv.bias = None if bias is None else nn.Parameter(bias.detach().clone())
    return conv


def enlarged(x: Tensor, like: Tensor) -> Tensor:
    """A map of half the size at the size of another; one that has it stays as it is.

    At an odd edge the two differ by a cell: it is cut, or repeated where the finer map's backbone
    has dropped a cell of the coarser one's.
    """
    if x.shape[-2:] == like.shape[-2:]:
        return x
    return fitted(functional.interpolate(x, scale_factor=2.0, mode="nearest"), like)


def fitted(x: Tensor, like: Tensor) -> Tensor:
    """A map at the size of another, from which an odd edge makes it differ by a cell.

    It is cut, or its edge repeated where the backbone has dropped a cell.
    """
    if x.shape[-2:] == like.shape[-2:]:
        return x
    height, width = like.shape[-2:]
    down, right = max(0, height - x.shape[-2]), max(0, width - x.shape[-1])
    if down or right:
        x = functional.pad(x, (0, right, 0, down), mode="replicate")
    return x[..., :height, :width]


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
        of_two: Whether the input are two maps, which together have its channels.
    """

    def __init__(
        self, inputs: int, inner: int, outputs: int, blocks: int, of_two: bool = False
    ) -> None:
        super().__init__()
        self.way, self.shortcut = (
            ConvNormOfTwo(inputs, inner) if of_two else ConvNorm(inputs, inner, 1) for _ in range(2)
        )
        self.blocks = nn.Sequential(*(RepVGGBlock(inner) for _ in range(blocks)))
        self.output = ConvNorm(inner, outputs, 1) if inner != outputs else nn.Identity()

    def forward(self, *maps: Tensor) -> Tensor:
        """``[B, inputs, H, W]``, or :class:`ConvNormOfTwo`'s, to ``[B, outputs, H, W]``."""
        out: Tensor = self.output(self.blocks(self.way(*maps)) + self.shortcut(*maps))
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
        self, first: nn.Module, ways: Iterable[nn.Module], last: ConvNorm, channels: int
    ) -> None:
        super().__init__()
        self.channels = channels
        self.first = first
        self.ways = nn.ModuleList(ways)
        self.last = last

    def forward(self, *maps: Tensor) -> Tensor:
        """What the first convolution takes to ``[B, outputs, H, W]``."""
        seen = list(self.first(*maps).split(self.channels, 1))
        for way in self.ways:
            seen.append(way(seen[-1]))
        out: Tensor = self.last(torch.cat(seen, 1))
        return out


class GelanBlock(LayersBeside):
    """Two CSP blocks, one upon the other, whose results all lie beside the input (GELAN).

    Wang et al. 2024, YOLOv9, figure 4, as D-FINE has it. The input are two maps, the first of the
    second's size or half of it.

    Args:
        width: Channels of each map, and of the result.
        inner: Channels of each CSP block.
        blocks: Number of RepVGG blocks in each.
        adds: The two maps are added, where they otherwise lie beside each other.
        smooth: Whether a 3x3 convolution ends each way.
    """

    def __init__(self, width: int, inner: int, blocks: int, adds: bool, smooth: bool) -> None:
        first = ConvNorm(width, 2 * width, 1) if adds else ConvNormOfTwo(2 * width, 2 * width)
        ways = [
            nn.Sequential(
                CSPBlock(before, inner, inner, blocks),
                *([ConvNorm(inner, inner, 3)] if smooth else []),
            )
            for before in (width, inner)
        ]
        super().__init__(first, ways, ConvNorm(2 * width + 2 * inner, width, 1), width)
        self.adds = adds

    def forward(self, *maps: Tensor) -> Tensor:
        """``[B, width, ...]`` of each map to ``[B, width, H, W]``."""
        if self.adds:
            first, second = maps
            maps = (second + enlarged(first, second),)
        return super().forward(*maps)


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
