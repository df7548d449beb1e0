"""A trained detector with fewer operators, for graphs.

What one block can join by itself is its own (:class:`detr.models.convolutions.Fusible`). Here is
what lies in two parts of a detector: linear maps one after the other, with nothing between them,
are a single one.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval

from detr.models.attention.deformable import DeformableAttention
from detr.models.backbones.neck import Neck
from detr.models.convolutions import ConvNorm, ConvNormOfTwo, Fusible, pointwise
from detr.models.detector import Detector
from detr.models.encoders.hybrid import HybridEncoder
from detr.models.queries.proposals import TokenChoice


def fused(detector: Detector) -> Detector:
    """A copy that computes the same, up to rounding, and cannot be trained; itself if nothing is.

    Args:
        detector: In evaluation mode.
    """
    if not any(isinstance(inner, Fusible) for inner in detector.modules()):
        return detector
    copied = copy.deepcopy(detector)
    for inner in list(copied.modules()):
        if isinstance(inner, Fusible):
            inner.fuse()
    encoder = copied.encoder
    if isinstance(encoder, HybridEncoder):
        encoder.keeps_layers = False
        if isinstance(copied.neck, Neck):
            _join_neck(copied.neck, encoder)
        if copied.pixels is None:
            _join_readers(copied, encoder)
    return copied


def _join_neck(neck: Neck, encoder: HybridEncoder) -> None:
    """The neck's convolutions of all maps but the coarsest, with the encoder's first of each."""
    for index, block in enumerate(reversed(encoder.top_down)):
        conv = _convolution(neck.projections[index])
        readers = [m for m in block.modules() if isinstance(m, ConvNormOfTwo)]
        outputs = sum(reader.conv.out_channels for reader in readers)
        if not readers or conv is None or not _fewer(conv.in_channels, conv.out_channels, outputs):
            continue
        for reader in readers:
            reader.conv = _chained(conv, reader.conv)
        neck.projections[index] = nn.Identity()


def _convolution(projection: nn.Module) -> nn.Conv2d | None:
    """A 1x1 convolution with its batch norm, unless it is another or has another norm."""
    if not isinstance(projection, nn.Sequential):
        return None
    conv, *norms = projection
    if not isinstance(conv, nn.Conv2d) or conv.kernel_size != (1, 1):
        return None
    for norm in norms:
        if not isinstance(norm, nn.BatchNorm2d):
            return None
        conv = fuse_conv_bn_eval(conv, norm)
    return conv


def _join_readers(detector: Detector, encoder: HybridEncoder) -> None:
    """The encoder's last convolution of each map, with all that reads the tokens they make."""
    looks = [layer.cross_attention for layer in detector.decoder.layers]
    values = [x.value_proj if isinstance(x, DeformableAttention) else None for x in looks]
    choices = [
        choice.project if choice.projects else None
        for choice in detector.source.modules()
        if isinstance(choice, TokenChoice)
    ]
    readers = [reader for reader in (*values, *choices) if reader is not None]
    if len(readers) < len(values) + len(choices):
        return
    last = [p.conv for p in encoder.projections if isinstance(p, ConvNorm)]
    outputs = sum(reader.out_features for reader in readers)
    if len(last) < len(encoder.projections) or not all(
        _fewer(conv.in_channels, conv.out_channels, outputs) for conv in last
    ):
        return
    maps = []
    for conv in last:
        assert conv.bias is not None
        maps.append((conv.weight.flatten(1), conv.bias))
    for reader in readers:
        reader.follow(maps)
    encoder.projections = nn.ModuleList(nn.Identity() for _ in last)


def _fewer(inputs: int, width: int, outputs: int) -> bool:
    """Whether one map needs fewer multiplications than one to the width and one from it."""
    return inputs * outputs < (inputs + outputs) * width


@torch.no_grad()
def _chained(before: nn.Conv2d, after: nn.Conv2d) -> nn.Conv2d:
    """Two 1x1 convolutions, the second with a bias, as one."""
    kernel = after.weight.flatten(1)
    assert after.bias is not None
    bias = after.bias if before.bias is None else after.bias + kernel @ before.bias
    return pointwise((kernel @ before.weight.flatten(1))[..., None, None], bias)
