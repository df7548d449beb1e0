from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from detr.data import PreprocessConfig, preprocess
from detr.data.preprocess import fit
from detr.errors import UserError


def test_padding_is_zero_after_normalization() -> None:
    config = PreprocessConfig(size=(32, 64))
    image = np.full((16, 16, 3), 255, dtype=np.uint8)
    inputs = preprocess([image], config)
    assert inputs.images.shape == (1, 3, 32, 64)
    assert inputs.valid_sizes.tolist() == [[32, 32]]
    assert inputs.original_sizes.tolist() == [[16, 16]]
    white = (255 - np.array(config.mean)) / np.array(config.std)
    assert np.allclose(inputs.images[0, :, 5, 5], white, atol=1e-5)
    assert not inputs.images[0, :, :, 32:].any()


@pytest.mark.parametrize(
    ("image", "canvas", "expected"),
    [
        ((375, 1242), (128, 416), (126, 416)),
        ((1242, 375), (128, 416), (128, 39)),
        ((1, 5000), (64, 64), (1, 64)),
        ((64, 64), (64, 64), (64, 64)),
    ],
)
def test_fit_keeps_the_aspect(
    image: tuple[int, int], canvas: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert fit(*image, canvas) == expected


def test_a_gray_array_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        preprocess([np.zeros((16, 16), dtype=np.uint8)], PreprocessConfig(size=(32, 32)))
    assert caught.value.code == "image-shape"


def test_pixels_do_not_depend_on_the_order_pillow_would_choose() -> None:
    """Rows first, whatever the sizes."""
    image = np.random.default_rng(0).integers(0, 256, (200, 40, 3)).astype(np.uint8)
    config = PreprocessConfig(size=(60, 64), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    wide = Image.fromarray(image).resize((12, 200), Image.Resampling.BILINEAR)
    expected = np.asarray(wide.resize((12, 60), Image.Resampling.BILINEAR))
    found = preprocess([image], config).images[0, :, :60, :12]
    np.testing.assert_array_equal(found, expected.transpose(2, 0, 1))


PAPERS = PreprocessConfig(short=800, long=1333)


@pytest.mark.parametrize(
    ("image", "scaled"),
    [
        # What DETR's RandomResize([800], max_size=1333) makes of images of common sizes.
        ((480, 640), (800, 1066)),
        ((640, 480), (1066, 800)),
        ((427, 640), (800, 1199)),
        ((640, 640), (800, 800)),
        ((375, 1242), (402, 1331)),
        ((333, 500), (800, 1201)),
        ((800, 1000), (800, 1000)),
        ((800, 3000), (355, 1331)),
        ((100, 960), (139, 1334)),  # the short side is rounded first: the long one may exceed
    ],
)
def test_the_papers_size(image: tuple[int, int], scaled: tuple[int, int]) -> None:
    assert PAPERS.scaled(*image) == scaled
    assert PAPERS.scaled(*image[::-1]) == scaled[::-1]


@settings(max_examples=300, deadline=None)
@given(height=st.integers(1, 4000), width=st.integers(1, 4000))
def test_an_image_at_the_papers_size_has_its_short_side_or_its_long_side(
    height: int, width: int
) -> None:
    low, high = sorted(PAPERS.scaled(height, width))
    aspect = Fraction(max(height, width), min(height, width))
    if aspect * 800 <= 1333:
        assert (low, high) == (800, int(800 * aspect))
    else:
        assert low == max(1, round(1333 / aspect))
        assert high <= 1333 + aspect / 2 or low == 1


def test_a_batch_is_as_large_as_its_largest_image() -> None:
    images = [np.full((48, 64, 3), 9, dtype=np.uint8), np.full((64, 32, 3), 9, dtype=np.uint8)]
    config = PreprocessConfig(short=40, long=60)
    both = preprocess(images, config)
    assert both.images.shape == (2, 3, 60, 53)
    assert both.valid_sizes.tolist() == [[40, 53], [60, 30]]
    alone = preprocess(images[:1], config)
    assert alone.images.shape == (1, 3, 40, 53)
    np.testing.assert_array_equal(both.images[0, :, :40, :53], alone.images[0])
    assert not both.images[0, :, 40:].any()


def test_a_fixed_canvas_takes_the_papers_size_where_it_fits() -> None:
    landscape, portrait = PAPERS.canvases
    assert (landscape, portrait) == ((800, 1344), (1344, 800))
    wide, tall = PAPERS.on(landscape), PAPERS.on(portrait)
    for size, belongs in (((480, 640), wide), ((640, 640), wide), ((640, 480), tall)):
        assert [canvas for canvas in (wide, tall) if canvas.meant_for(*size)] == [belongs]
    placed = PAPERS.on(landscape)
    assert placed.scaled(480, 640) == (800, 1066) and placed.canvases == (landscape,)
    assert placed.scaled(100, 960) == (139, 1334)
    assert placed.scaled(640, 480) == fit(640, 480, landscape) == (800, 600)
    # What a canvas alone makes of a small landscape image is larger or smaller than the papers'.
    assert PreprocessConfig(size=landscape).scaled(480, 640) == (800, 1067)
    assert PreprocessConfig(size=landscape).scaled(200, 640) == (420, 1344)
    assert PreprocessConfig(short=64, long=64).canvases == ((64, 64),)
    assert PreprocessConfig(size=(32, 64)).on((64, 64)).size == (32, 64)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "give a canvas"),
        ({"short": 800}, "short and long go together"),
        ({"size": (64, 64), "long": 800}, "short and long go together"),
        ({"short": 800, "long": 600}, "more than long"),
        ({"short": 8, "long": 600}, "16"),
    ],
)
def test_half_a_size_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        PreprocessConfig.model_validate(values)


def test_what_was_stored_before_there_were_two_kinds_loads() -> None:
    old = {"size": [96, 320], "mean": [1.0, 2.0, 3.0], "std": [4.0, 5.0, 6.0]}
    config = PreprocessConfig.model_validate(old)
    assert config.size == (96, 320) and config.short is None
    assert PreprocessConfig.model_validate_json(PAPERS.model_dump_json()) == PAPERS
