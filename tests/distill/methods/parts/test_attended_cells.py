"""Sampled attention as cells of the memory, by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from detr.models import Detector, SampledAttention
from distill.methods.parts import attended_cells as sampling
from distill.methods.parts.attended_cells import (
    attended_cells,
    dense,
    mean_heads,
    squared_distance,
    weighted_map,
)

SHAPES = ((2, 4), (1, 2))


def sampled(
    locations: list[list[float]], weights: list[float], levels: int = 1
) -> SampledAttention:
    """One image, query and head; the samples are points of one level each."""
    points = len(weights) // levels
    return SampledAttention(
        torch.tensor(locations).reshape(1, 1, 1, levels, points, 2),
        torch.tensor(weights).reshape(1, 1, 1, levels, points),
        points,
    )


def test_a_sample_between_four_cells_is_split_bilinearly() -> None:
    # x = 0.40625 * 4 - 0.5 = 1.125, y = 0.5 * 2 - 0.5 = 0.5.
    found = dense(attended_cells(sampled([[0.40625, 0.5]], [0.8]), SHAPES[:1]))
    expected = torch.zeros(2, 4)
    expected[:, 1], expected[:, 2] = 0.8 * 0.5 * 0.875, 0.8 * 0.5 * 0.125
    torch.testing.assert_close(found.flatten(), expected.flatten())


def test_cell_centers_belong_to_one_cell_and_the_outside_is_dropped() -> None:
    # The center of cell (row 1, column 0), and a point half a cell left of the map's left edge.
    two = sampled([[0.125, 0.75], [-0.125, 0.25]], [0.25, 0.75])
    found = dense(attended_cells(two, SHAPES[:1]))
    expected = torch.zeros(8)
    expected[4] = 0.25
    torch.testing.assert_close(found.flatten(), expected)
    edge = dense(attended_cells(sampled([[0.0, 0.25]], [1.0]), SHAPES[:1]))
    assert edge.sum() == 0.5


def test_levels_follow_each_other() -> None:
    found = dense(attended_cells(sampled([[0.125, 0.25], [0.75, 0.5]], [0.6, 0.4], 2), SHAPES))
    expected = torch.zeros(10)
    expected[0], expected[9] = 0.6, 0.4
    torch.testing.assert_close(found.flatten(), expected)


def test_levels_may_have_unequal_numbers_of_samples() -> None:
    """Two on the fine level, one on the coarse one, as with a second that weighs nothing."""
    places = torch.rand(1, 2, 1, 3, 2, generator=torch.Generator().manual_seed(0))
    weights = torch.rand(1, 2, 1, 3, generator=torch.Generator().manual_seed(1))
    padded = torch.cat((places, places[..., -1:, :]), 3), torch.nn.functional.pad(weights, (0, 1))
    even = SampledAttention(padded[0].unflatten(3, (2, 2)), padded[1].unflatten(3, (2, 2)), 2)
    found = attended_cells(SampledAttention(places, weights, (2, 1)), SHAPES)
    assert found.index.shape == (1, 2, 1, 12)
    torch.testing.assert_close(dense(found), dense(attended_cells(even, SHAPES)))


def random(seed: int) -> SampledAttention:
    generator = torch.Generator().manual_seed(seed)
    locations = torch.rand(2, 3, 2, 2, 4, 2, generator=generator) * 1.4 - 0.2
    weights = torch.rand(2, 3, 2, 2, 4, generator=generator)
    return SampledAttention(locations.requires_grad_(), weights.requires_grad_(), 4)


def test_spread_is_the_weighted_mean_over_heads_of_the_dense_maps() -> None:
    cells = attended_cells(random(0), SHAPES)
    weights = torch.tensor([[1.0, 0.0, 2.0], [0.5, 3.0, 0.0]])
    expected = (dense(cells).mean(2) * weights[..., None]).sum(1)
    torch.testing.assert_close(weighted_map(cells, weights), expected)
    torch.testing.assert_close(dense(mean_heads(cells)), dense(cells).mean(2))


@pytest.mark.parametrize("cached", [1, 50, 2**19])
def test_squared_distance_equals_the_dense_one_and_its_gradient(
    cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One query and head at a time, five with two left over, all.
    monkeypatch.setattr(sampling, "_CACHED", cached)
    first, second = random(1), random(2)
    sparse = squared_distance(attended_cells(first, SHAPES), attended_cells(second, SHAPES))
    full = (
        (dense(attended_cells(first, SHAPES)) - dense(attended_cells(second, SHAPES)))
        .square()
        .sum()
    )
    torch.testing.assert_close(sparse, full)
    inputs = [first.locations, first.weights, second.locations, second.weights]
    for ours, theirs in zip(
        torch.autograd.grad(sparse, inputs), torch.autograd.grad(full, inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
        assert ours.any()


def test_a_location_that_is_not_a_number_has_cells_and_no_weight_to_trust() -> None:
    cells = attended_cells(
        sampled([[float("nan"), 0.5], [0.5, float("inf")]], [0.5, 0.5]), SHAPES[:1]
    )
    assert cells.index.min() >= 0 and cells.index.max() < cells.size
    assert squared_distance(cells, cells).isnan()


def test_reading_the_cells_is_what_the_attention_reads(build: Callable[..., Detector]) -> None:
    """The dense map times the values is the deformable attention's output."""
    from detr.models.attention.ms_deform_attn import ms_deform_attn

    attention = random(3)
    values = torch.randn(2, 10, 2, 5, generator=torch.Generator().manual_seed(4))
    expected = ms_deform_attn(values, SHAPES, attention.locations, attention.weights)
    maps = dense(attended_cells(attention, SHAPES))
    found = torch.einsum("bnms,bsmd->bnmd", maps, values).flatten(2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_self_attention_maps_come_only_where_asked_and_change_nothing(
    build: Callable[..., Detector], target: Callable[..., object]
) -> None:
    detector = build(seed=5).train()
    memory = detector.encode(torch.randn(2, 3, 64, 96), torch.tensor([[64.0, 96.0]] * 2))
    groups = detector.queries(memory, [target([[0.5, 0.5, 0.2, 0.2]], [0])] * 2)  # type: ignore[list-item]
    plain = detector.decode(memory, groups)
    asked = detector.decode(memory, groups, self_attention={"own"})
    assert [len(o.self_attention) for o in plain + asked] == [0, 0, 2, 0]
    for ours, theirs in zip(asked, plain, strict=True):
        for a, b in zip(ours.logits + ours.boxes, theirs.logits + theirs.boxes, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for rows in asked[0].self_attention:
        assert rows.shape == (2, 4, 7, 7)
        torch.testing.assert_close(rows.sum(-1), torch.ones(2, 4, 7))
    noisy = detector.decode(memory, groups, self_attention={"denoising"})[1]
    count = groups[1].content.shape[1]
    assert noisy.self_attention[0].shape == (2, 4, count, count + 7)
