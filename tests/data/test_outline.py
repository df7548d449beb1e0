"""One polygon in place of any mask."""

from __future__ import annotations

import numpy as np
import pytest

from detr.data.outline import single_polygon
from detr.masks import Polygons, encode


@pytest.mark.parametrize("seed", range(40))
def test_it_fills_the_same_pixels(seed: int) -> None:
    """Parts, holes, diagonal neighbors and single pixels."""
    rng = np.random.default_rng(seed)
    size = (int(rng.integers(1, 30)), int(rng.integers(1, 30)))
    pixels = rng.random(size) < rng.random()
    outline = single_polygon(encode(pixels), size)
    if not pixels.any():
        assert outline.shape == (0, 2)
        return
    assert (outline >= 0).all() and (outline <= size[::-1]).all()
    assert np.array_equal(Polygons((outline,)).rle(size).pixels(), pixels)


def test_a_polygon_in_the_image_stays_as_it_is() -> None:
    corners = np.array([[1.25, 2.5], [9, 3], [5, 8.75]])
    assert single_polygon(Polygons((corners,)), (10, 12)) is corners
    beyond = single_polygon(Polygons((corners + 5,)), (10, 12))
    assert beyond.max() <= 12
    assert encode(Polygons((beyond,)).rle((10, 12)).pixels()) == Polygons((corners + 5,)).rle(
        (10, 12)
    )
