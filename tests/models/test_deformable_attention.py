"""Deformable attention with numbers of points per level."""

from __future__ import annotations

import pytest
import torch

from detr.models import build_detector
from detr.models.attention.deformable import DeformableAttention
from detr.models.geometry import sampling_frame, valid_ratios

SHAPES = ((6, 8), (3, 4))
POINTS = (3, 1)


@pytest.mark.parametrize("discrete", [False, True])
def test_unequal_points_are_equal_ones_of_which_some_weigh_nothing(discrete: bool) -> None:
    """About centers, whose offsets do not depend on the number of points."""
    torch.manual_seed(0)
    equal = DeformableAttention(16, 4, 2, 3, discrete)
    unequal = DeformableAttention(16, 4, 2, POINTS, discrete)
    with torch.no_grad():
        for parameter in equal.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        kept = torch.arange(4 * 6).view(4, 6)[:, [0, 1, 2, 3]].flatten()
        state = equal.state_dict()
        for name in ("sampling_offsets", "attention_weights"):
            for kind in ("weight", "bias"):
                rows = state[f"{name}.{kind}"].unflatten(0, (4 * 6, -1))[kept]
                state[f"{name}.{kind}"] = rows.flatten(0, 1)
        unequal.load_state_dict(state)
        dropped = torch.ones(4 * 6, dtype=torch.bool)
        dropped[kept] = False
        equal.attention_weights.bias[dropped] = -1e9
    query, tokens = torch.randn(1, 5, 16), torch.randn(1, 60, 16)
    ratios = valid_ratios(torch.tensor([[40.0, 50.0]]), SHAPES, (48, 64))
    found = []
    for attention in (equal, unequal):
        frame = sampling_frame(torch.rand(1, 5, 2), ratios, SHAPES, attention.points)
        frame = frame._replace(center=frame.center * 0 + 0.4)
        padding = torch.zeros(1, 60, dtype=torch.bool)
        found.append(attention(query, frame, tokens, padding, SHAPES)[0])
    torch.testing.assert_close(found[1], found[0])


def test_points_start_at_growing_distances_on_each_level() -> None:
    bias = DeformableAttention(16, 4, 2, POINTS).sampling_offsets.bias.view(4, 4, 2)
    torch.testing.assert_close(bias.abs().amax(-1), torch.tensor([[1.0, 2, 3, 1]]).expand(4, -1))


def test_a_detector_of_unequal_points_learns_and_shows_its_samples(small_preset) -> None:
    torch.manual_seed(0)
    points = {f"{part}.points": [1, 3, 2, 2] for part in ("encoder", "decoder.cross_attention")}
    detector = build_detector(small_preset("deformable-detr", **points))
    memory = detector.encode(torch.randn(1, 3, 64, 64), torch.tensor([[64.0, 48.0]]))
    output = detector.decode(memory, detector.queries(memory), attention=True)[0]
    assert output.attention[-1].weights.shape == (1, 12, 4, 8)
    output.hidden[-1].square().sum().backward()
    for layer in detector.decoder.layers:
        assert layer.cross_attention.sampling_offsets.bias.grad.abs().sum() > 0
