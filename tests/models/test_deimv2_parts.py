"""DEIMv2's parts alone: means of the image, norms without a mean, gated networks."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional

from detr.config import DecoderConfig, DetectorConfig, LiteEncoderConfig, NeckConfig
from detr.models.backbones.neck import Neck
from detr.models.encoders.hybrid import LiteEncoder
from detr.models.geometry import padding_mask
from detr.models.layers import FeedForward, RMSNorm
from detr.models.structures import Levels

NECK = NeckConfig(levels=2, group_norm=False, batch_norm=True, pooled=True)


def lite() -> LiteEncoder:
    encoder = LiteEncoderConfig(expansion=0.5, blocks=1)
    config = DetectorConfig(
        num_classes=2,
        width=16,
        attention_heads=2,
        backbone={"strides": (16,)},
        neck=NECK,
        encoder=encoder,
    )
    torch.manual_seed(0)
    return LiteEncoder(config, encoder).eval()


@torch.no_grad()
def test_a_map_learns_its_mean_over_the_image() -> None:
    shapes = ((4, 6), (2, 3))
    ratios = torch.tensor([[[1.0, 1.0]] * 2, [[2 / 3, 0.5]] * 2])
    maps = [torch.randn(2, 16, *shape) for shape in shapes]
    levels = Levels(maps, padding_mask(ratios, shapes), ratios)
    found = lite()._informed(maps[1], levels, 1)
    whole = maps[1][0] + maps[1][0].mean((1, 2), keepdim=True)
    # The second image fills one row of two cells.
    part = maps[1][1] + maps[1][1][:, :1, :2].mean((1, 2), keepdim=True)
    torch.testing.assert_close(found, torch.stack((whole, part)))


@torch.no_grad()
def test_what_lies_in_the_padding_is_in_no_mean() -> None:
    encoder = lite()
    shapes = ((8, 8), (4, 4))
    ratios = torch.tensor([[[0.5, 0.5]] * 2])
    maps = [torch.randn(1, 16, *shape) for shape in shapes]
    other = [x.clone() for x in maps]
    # Far enough from the image that no convolution sees it there.
    other[1][:, :, 3:, 3:] += 5.0
    padding = padding_mask(ratios, shapes)
    one, same = (
        encoder._informed(x[1], Levels(x, padding, ratios), 1)[..., :2, :2] for x in (maps, other)
    )
    assert torch.equal(one, same)


@torch.no_grad()
def test_further_levels_are_means() -> None:
    neck = Neck(NECK, (8,), 16).eval()
    torch.manual_seed(0)
    levels = neck([torch.randn(1, 8, 5, 6)])
    assert [tuple(x.shape[-2:]) for x in levels] == [(5, 6), (3, 3)]
    mixed = neck.pooled[0][1].conv(functional.avg_pool2d(levels[0], 3, 2, 1))
    wanted = functional.silu(neck.pooled[0][1].norm(mixed))
    torch.testing.assert_close(levels[1], wanted)


def test_pooled_levels_have_batch_norms() -> None:
    with pytest.raises(ValidationError, match="set batch_norm to true"):
        NeckConfig(pooled=True)


@torch.no_grad()
def test_the_norm_is_torchs() -> None:
    norm = RMSNorm(6)
    norm.weight.normal_()
    x = 3 * torch.randn(2, 5, 6)
    wanted = functional.rms_norm(x, (6,), norm.weight, 1e-6)
    torch.testing.assert_close(norm(x), wanted)
    # Squares of halves beyond 256 are infinite.
    half = norm.half()((300 * x).half())
    assert half.isfinite().all() and half.dtype == torch.float16


@torch.no_grad()
def test_a_gated_network_is_the_formula() -> None:
    block = FeedForward(6, DecoderConfig(ffn=5, activation="swiglu"), 0.0, RMSNorm)
    x = torch.randn(2, 6)
    gate, value = block.expand(x).chunk(2, -1)
    torch.testing.assert_close(
        block(x), block.norm(x + block.contract(functional.silu(gate) * value))
    )
    assert block.expand.weight.shape == (10, 6)
