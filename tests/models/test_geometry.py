"""Formulas checked against slow, literal versions of themselves."""

from __future__ import annotations

import math

import pytest
import torch

from detr.models.boxes import cxcywh_to_xyxy, inverse_sigmoid, xyxy_to_cxcywh
from detr.models.geometry import (
    padding_mask,
    sampling_frame,
    token_centers,
    valid_ratios,
    whole_cells,
)
from detr.models.queries.position import image_positions, reference_embedding

SHAPES = ((12, 20), (6, 10), (3, 5))
STRIDES = (8, 16, 32)
CANVAS = (96, 160)


@pytest.mark.parametrize(("height", "width"), [(96, 160), (80, 130), (33, 1), (64, 129)])
def test_padding_starts_at_the_first_cell_outside(height, width):
    ratios = valid_ratios(torch.tensor([[height, width]], dtype=torch.float32), SHAPES, CANVAS)
    padding = padding_mask(ratios, SHAPES)[0]
    expected = [
        x * stride >= width or y * stride >= height
        for (rows, columns), stride in zip(SHAPES, STRIDES, strict=True)
        for y in range(rows)
        for x in range(columns)
    ]
    assert padding.tolist() == expected


def test_every_width_of_a_kitti_canvas_counts_the_cells_the_original_codes_do():
    canvas, shapes = (402, 1333), ((51, 167), (26, 84), (13, 42), (7, 21))
    widths = torch.arange(1, 1334)
    sizes = torch.stack((torch.full((1333,), 402), widths), -1).float()
    valid = (~padding_mask(valid_ratios(sizes, shapes, canvas), shapes)).split(
        [h * w for h, w in shapes], 1
    )
    inside = (torch.arange(1333)[None] < widths[:, None]).float()
    for level, (height, width) in enumerate(shapes):
        counted = valid[level].view(-1, height, width)[:, 0].sum(-1)
        expected = torch.nn.functional.interpolate(inside[:, None], width).sum((1, 2))
        assert torch.equal(counted.float(), expected)


def test_image_position_is_the_cumulative_one():
    valid = torch.tensor([[80.0, 130.0]])
    ratios = valid_ratios(valid, SHAPES, CANVAS)
    for offset, temperature in ((-0.5, 10000.0), (0.0, 20.0)):
        levels = image_positions(ratios, SHAPES, 32, temperature, offset)
        masks = padding_mask(ratios, SHAPES).split([h * w for h, w in SHAPES], 1)
        for (height, width), mask, got in zip(SHAPES, masks, levels, strict=True):
            inside = ~mask.view(height, width)
            y, x = inside.cumsum(0).float(), inside.cumsum(1).float()
            y = (y + offset) / (y[-1:] + 1e-6) * 2 * math.pi
            x = (x + offset) / (x[:, -1:] + 1e-6) * 2 * math.pi
            got = got.view(height, width, 32)
            for row, column in ((0, 0), (1, 3), (2, 2)):
                for half, value in ((0, y[row, column]), (16, x[row, column])):
                    for i in range(8):
                        angle = value / temperature ** (2 * i / 16)
                        assert got[row, column, half + 2 * i] == pytest.approx(
                            math.sin(angle), abs=1e-5
                        )
                        assert got[row, column, half + 2 * i + 1] == pytest.approx(
                            math.cos(angle), abs=1e-5
                        )


def test_reference_embedding_order():
    reference = torch.tensor([0.1, 0.2, 0.3, 0.4])
    parts = reference_embedding(reference, (1, 0, 2, 3), 8).view(4, 8)
    for part, value in zip(parts, (0.2, 0.1, 0.3, 0.4), strict=True):
        assert part[0] == pytest.approx(math.sin(2 * math.pi * value), abs=1e-6)
        assert part[3] == pytest.approx(math.cos(2 * math.pi * value / 10000**0.25), abs=1e-6)


def test_sampling_frames():
    ratios = torch.tensor([[[0.5, 1.0], [0.6, 0.8], [1.0, 1.0]]])
    box = torch.tensor([[[0.2, 0.4, 0.1, 0.3]]])
    center, unit, _ = sampling_frame(box, ratios, SHAPES, points=4)
    torch.testing.assert_close(center[0, 0, 1, 2], torch.tensor([0.2 * 0.6, 0.4 * 0.8]))
    torch.testing.assert_close(unit[0, 0, 1, 3], torch.tensor([0.1 * 0.6 / 8, 0.3 * 0.8 / 8]))
    center, unit, _ = sampling_frame(box[..., :2], ratios, SHAPES, points=4)
    torch.testing.assert_close(center[0, 0, 0, 0], torch.tensor([0.1, 0.4]))
    torch.testing.assert_close(unit[0, 0, 2, 0], torch.tensor([1 / 5, 1 / 3]))


@pytest.mark.parametrize("sizes", [2, 4], ids=["centers", "boxes"])
def test_frames_of_unequal_points_are_those_of_each_number(sizes):
    ratios = torch.tensor([[[0.5, 1.0], [0.6, 0.8], [1.0, 1.0]]])
    reference = torch.tensor([[[0.2, 0.4, 0.1, 0.3], [0.7, 0.6, 0.4, 0.2]]])[..., :sizes]
    found = sampling_frame(reference, ratios, SHAPES, points=(1, 3, 2))
    alone = [sampling_frame(reference, ratios, SHAPES, points=n) for n in (1, 3, 2)]
    for part in ("center", "unit"):
        levels = [getattr(frame, part)[:, :, level] for level, frame in enumerate(alone)]
        torch.testing.assert_close(getattr(found, part), torch.cat(levels, -2))


def test_token_centers_are_relative_to_the_image():
    ratios = valid_ratios(torch.tensor([[96.0, 80.0]]), SHAPES, CANVAS)
    centers = token_centers(ratios, SHAPES)[0, : 12 * 20].view(12, 20, 2)
    torch.testing.assert_close(centers[3, 9], torch.tensor([9.5 / 10, 3.5 / 12]))
    assert centers[3, 10, 0] > 1


def test_box_formats_invert_each_other():
    boxes = torch.rand(5, 4)
    torch.testing.assert_close(xyxy_to_cxcywh(cxcywh_to_xyxy(boxes)), boxes)
    ends = inverse_sigmoid(torch.tensor([0.0, 0.3, 1.0, 2.0]))
    assert ends.isfinite().all()
    torch.testing.assert_close(ends.sigmoid()[1], torch.tensor(0.3))


def test_whole_cells_are_those_of_the_image():
    """RT-DETRv2's discrete samples: cell ``floor(x * width + 1/2)``, never beyond the image."""
    shapes = ((4, 8), (2, 4))
    ratios = torch.tensor([[[0.5, 1.0], [0.5, 1.0]]])  # the right half is padding
    x = torch.tensor([-0.3, 0.0, 0.06, 0.07, 0.2, 0.3, 0.45, 0.49, 0.6, 1.3])
    places = torch.stack((x, torch.full_like(x, 0.99)), -1).view(1, 1, 1, 1, 10, 2)
    found = whole_cells(places.expand(-1, -1, -1, 2, -1, -1), ratios, shapes, 10)
    for level, (height, width) in enumerate(shapes):
        cells = found[0, 0, 0, level] * torch.tensor([width, height]) - 0.5
        last = width // 2 - 1
        wanted = [min(max(math.floor(v * width + 0.5), 0), last) for v in x.tolist()]
        assert cells[:, 0].tolist() == pytest.approx(wanted, abs=1e-5)
        assert cells[:, 1].tolist() == pytest.approx([height - 1] * 10, abs=1e-5)
    unequal = torch.cat((places[0, :, :, 0, :7], places[0, :, :, 0, :2]), 2)[None]
    wanted = torch.cat((found[0, :, :, 0, :7], found[0, :, :, 1, :2]), 2)[None]
    torch.testing.assert_close(whole_cells(unequal, ratios, shapes, (7, 2)), wanted)
