from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from detr.data import PreprocessConfig, preprocess
from detr.data.preprocess import fit
from detr.errors import UserError


def test_padding_is_zero_after_normalisation() -> None:
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


def test_a_grey_array_is_refused() -> None:
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
