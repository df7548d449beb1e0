"""Mask logits become pixels of the image: beside torch's enlarging and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from detr.mask_scaling import MaskScaling, image_masks
from detr.masks import encode, encode_part, overlap

WHOLE = np.array([[-1e6, -1e6, 1e6, 1e6]], np.float32)


@pytest.mark.parametrize("seed", range(200))
def test_run_lengths_of_a_window(seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width = (int(v) for v in rng.integers(1, 12, 2))
    y0, x0 = int(rng.integers(0, height + 1)), int(rng.integers(0, width + 1))
    y1, x1 = int(rng.integers(y0, height + 1)), int(rng.integers(x0, width + 1))
    if seed % 3 == 0:  # runs go on from column to column
        y0, y1 = 0, height
    pixels = np.zeros((height, width), np.bool_)
    pixels[y0:y1, x0:x1] = rng.random((y1 - y0, x1 - x0)) < rng.choice([0.0, 0.3, 0.9, 1.0])
    part = encode_part(np.ascontiguousarray(pixels[y0:y1, x0:x1].T), (x0, y0), (height, width))
    assert part == encode(pixels)


@pytest.mark.parametrize("threshold", [0.5, 0.7])
@pytest.mark.parametrize("size", [(37, 61), (96, 160), (10, 300)])
def test_enlarged_as_torch_does(size: tuple[int, int], threshold: float) -> None:
    """The map covers the canvas, of which the image is the upper left 80 x 148 pixels."""
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(1, 24, 40)).astype(np.float32)
    wide = functional.interpolate(
        torch.from_numpy(logits)[None, :, :20, :37], size=size, mode="bilinear"
    )[0, 0]
    (mask,) = image_masks(logits, WHOLE, (80.0, 148.0), size, MaskScaling(threshold=threshold))
    wanted = (wide.sigmoid() > threshold).numpy()
    # Beside the right and lower edge torch has no cells of the padding to look at.
    inner = (slice(0, -(size[0] // 20) - 1), slice(0, -(size[1] // 37) - 1))
    assert mask.size == size
    assert (mask.pixels()[inner] == wanted[inner]).mean() > 0.999


def test_what_is_far_from_the_box_is_left_out() -> None:
    logits = np.full((1, 8, 12), 3.0, np.float32)
    box = np.array([[10.2, 4.0, 20.0, 12.5]], np.float32)
    exact = MaskScaling(margin=0.0)
    (mask,) = image_masks(logits, box, (32.0, 48.0), (32, 48), exact)
    assert mask.box == (10, 4, 20, 13) and mask.area == 10 * 9
    (mask,) = image_masks(logits, box, (32.0, 48.0), (32, 48), MaskScaling())
    assert mask.box == (7, 1, 23, 15)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_boxes_and_logits_that_are_no_numbers(value: float) -> None:
    logits = np.full((2, 8, 12), value, np.float32)
    boxes = np.array([[value] * 4, [0, 0, 48, 32]], np.float32)
    with np.errstate(invalid="ignore"):
        first, second = image_masks(logits, boxes, (32.0, 48.0), (32, 48), MaskScaling())
    assert first.area == 0 and second.area in (0, 32 * 48)


def test_overlap() -> None:
    pixels = np.zeros((4, 6), np.bool_)
    empty = encode(pixels)
    pixels[1:3] = True
    half = encode(pixels)
    assert overlap(empty, empty) == 1 and overlap(empty, half) == 0 and overlap(half, half) == 1
    assert overlap(half, encode(np.ones((4, 6), np.bool_))) == 0.5
