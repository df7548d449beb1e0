"""Joining linear maps across parts: the same answers, fewer operators, a model left as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from detr.config import DetectorConfig
from detr.models import Detector, build_detector
from detr.models.convolutions import ConvNormOfTwo
from detr.models.encoders.hybrid import HybridEncoder
from detr.models.fusing import fused
from detr.models.layers import TokenLinear

Small = Callable[..., DetectorConfig]
# Drops cells at odd edges, so that enlarged maps are too small.
CONVNEXT = {
    "name": "convnext_atto",
    "options": {"dims": (8, 16, 32, 32), "depths": (1, 1, 1, 1)},
}


def trained_like(config: DetectorConfig) -> Detector:
    """A detector whose statistics, norms and heads are at no special point."""
    torch.manual_seed(0)
    detector = build_detector(config)
    detector.encode(torch.randn(2, 3, 64, 96), torch.tensor([[64.0, 96.0]] * 2))
    with torch.no_grad():
        for x in detector.parameters():
            x.add_(0.05 * torch.randn_like(x))
    return detector.eval()


def joined_parts(detector: Detector) -> tuple[int, bool]:
    """Convolutions of the neck that are gone, and whether the encoder's last ones are."""
    assert isinstance(detector.encoder, HybridEncoder)
    necks = [isinstance(x, nn.Identity) for x in detector.neck.projections]
    readers = [m for m in detector.modules() if isinstance(m, TokenLinear)]
    followed = {reader.levels is not None for reader in readers}
    assert len(followed) == 1
    return sum(necks), followed.pop()


@pytest.mark.parametrize(
    ("family", "backbone", "changes", "wanted"),
    [
        ("rtdetr", None, {}, (2, True)),
        ("rtdetr", CONVNEXT, {}, (2, True)),
        ("d-fine", None, {}, (1, False)),  # its encoder ends without a convolution
        # Some would cost more joined than apart.
        ("rtdetr", None, {"encoder.width": 96}, (2, False)),
        ("rtdetr", None, {"encoder.width": 16, "encoder.expansion": 4.0}, (0, True)),
    ],
)
def test_a_fused_detector_answers_the_same(
    family: str,
    backbone: Any,
    changes: dict[str, Any],
    wanted: tuple[int, bool],
    small_preset: Small,
) -> None:
    config = small_preset(family, backbone, **changes)
    detector = trained_like(config)
    before = {name: x.clone() for name, x in detector.state_dict().items()}
    joined = fused(detector)
    assert joined_parts(joined) == wanted
    images = torch.randn(2, 3, 101, 167)
    valid = torch.tensor([[101.0, 167.0], [60.0, 167.0]])
    with torch.no_grad():
        ours, theirs = (x(images, valid, valid) for x in (joined, detector))
    torch.testing.assert_close(ours[1], theirs[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours[0], theirs[0], atol=0.02, rtol=1e-4)
    assert torch.equal(ours[2], theirs[2])
    assert all(torch.equal(x, before[name]) for name, x in detector.state_dict().items())


def test_a_detector_without_anything_to_fuse_is_not_copied(small_preset: Small) -> None:
    detector = build_detector(small_preset("dino")).eval()
    assert fused(detector) is detector


def test_two_maps_are_as_if_they_lay_beside_each_other() -> None:
    torch.manual_seed(0)
    module = ConvNormOfTwo(16, 8)
    coarse, fine = torch.randn(2, 8, 3, 4), torch.randn(2, 8, 5, 8)
    twice = functional.interpolate(coarse, scale_factor=2.0, mode="nearest")[..., :5, :]
    wanted = functional.silu(module.norm(module.conv(torch.cat((twice, fine), 1))))
    torch.testing.assert_close(module(coarse, fine), wanted, atol=1e-5, rtol=1e-4)
    wanted = functional.silu(module.norm(module.conv(torch.cat((fine, fine), 1))))
    torch.testing.assert_close(module(fine, fine), wanted, atol=1e-5, rtol=1e-4)
