"""Location and scale masks (CLoCKDistill equations 3 and 4) on hand-drawn maps."""

from __future__ import annotations

from collections.abc import Callable

import torch

from detr.models import Memory, Target
from detr.models.geometry import padding_mask
from distill.methods.parts.masks import scale_masks

Targets = Callable[..., Target]


def memory(shapes: tuple[tuple[int, int], ...], ratios: list[list[float]]) -> Memory:
    """An image per row of (width, height) valid ratios, the same on all levels."""
    batch = len(ratios)
    tokens = torch.zeros(batch, sum(h * w for h, w in shapes), 4)
    valid = torch.tensor(ratios)[:, None].expand(-1, len(shapes), -1).contiguous()
    return Memory(tokens, shapes, padding_mask(valid, shapes), valid, tokens)


def test_one_box_on_one_level(target: Targets) -> None:
    # x from 1.6 to 3.2 of 8 cells covers cells 1..4 (floor and ceil included), y from 0.4 to 1.2
    # of 4 covers 0..2: 12 cells, and 20 of background.
    box = [2.4 / 8, 0.8 / 4, 1.6 / 8, 0.8 / 4]
    fg, bg = scale_masks([target([box], [0])], memory(((4, 8),), [[1.0, 1.0]]))
    expected = torch.zeros(4, 8)
    expected[0:3, 1:5] = 1 / 12
    torch.testing.assert_close(fg.view(4, 8), expected)
    torch.testing.assert_close(bg.view(4, 8), (expected == 0) / 20)


def test_smallest_box_wins_where_boxes_overlap(target: Targets) -> None:
    large = [0.5, 0.5, 1.0, 1.0]  # all 8 x 8 cells
    small = [2.5 / 8, 2.5 / 8, 0.8 / 8, 0.8 / 8]  # 2.1 to 2.9: cells 2 and 3
    for order in ([large, small], [small, large]):
        fg, bg = scale_masks([target(order, [0, 1])], memory(((8, 8),), [[1.0, 1.0]]))
        expected = torch.full((8, 8), 1 / 64)
        expected[2:4, 2:4] = 1 / 4
        torch.testing.assert_close(fg.view(8, 8), expected)
        assert bg.sum() == 0


def test_every_object_and_the_background_weigh_one_per_level(target: Targets) -> None:
    boxes = [[0.2, 0.2, 0.1, 0.1], [0.75, 0.7, 0.3, 0.2]]
    shapes = ((16, 32), (8, 16), (4, 8))
    fg, bg = scale_masks([target(boxes, [0, 1])], memory(shapes, [[1.0, 1.0]]))
    for part, total in ((fg, 2.0), (bg, 1.0)):
        for level in part.split([512, 128, 32], 1):
            torch.testing.assert_close(level.sum(), torch.tensor(total))
    assert not ((fg > 0) & (bg > 0)).any()


def test_padding_weighs_nothing_and_scales_boxes(target: Targets) -> None:
    # The image covers 6 of 8 columns and 2 of 4 rows. A box over its right half covers columns
    # 3 to 5 and both rows: 6 cells, 6 of background, 20 of padding.
    fg, bg = scale_masks([target([[0.75, 0.5, 0.5, 1.0]], [0])], memory(((4, 8),), [[0.75, 0.5]]))
    expected = torch.zeros(4, 8)
    expected[:2, 3:6] = 1 / 6
    torch.testing.assert_close(fg.view(4, 8), expected)
    rest = torch.zeros(4, 8)
    rest[:2, :3] = 1 / 6
    torch.testing.assert_close(bg.view(4, 8), rest)


def test_images_without_objects_are_background_only(target: Targets) -> None:
    some = target([[0.5, 0.5, 0.2, 0.2]], [1])
    for targets in ([target([], []), some], [target([], [])] * 2):
        fg, bg = scale_masks(targets, memory(((4, 4),), [[1.0, 1.0]] * 2))
        assert fg[0].sum() == 0
        torch.testing.assert_close(bg[0], torch.full((16,), 1 / 16))
        assert (fg[1].sum() > 0) == (len(targets[1].labels) > 0)


def test_boxes_that_leave_the_image_count_their_visible_cells(target: Targets) -> None:
    # From -0.25 to 0.25: only cells 0 and 1 of 4 are on the map (ceil(1.0) is included).
    fg, _ = scale_masks([target([[0.0, 0.0, 0.5, 0.5]], [0])], memory(((4, 4),), [[1.0, 1.0]]))
    expected = torch.zeros(4, 4)
    expected[:2, :2] = 1 / 4
    torch.testing.assert_close(fg.view(4, 4), expected)
