"""Masks in memory are pycocotools' run lengths."""

from __future__ import annotations

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from detr.masks import Polygons, Rle, encode, from_counts, unpack


@pytest.mark.parametrize("seed", range(60))
def test_run_lengths_are_pycocotools(seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width = (int(v) for v in rng.integers(1, 50, 2))
    pixels = rng.random((height, width)) < rng.choice([0.0, 0.02, 0.5, 0.98, 1.0])
    mask = encode(pixels)
    theirs = coco_mask.encode(np.asfortranarray(pixels.astype(np.uint8)))
    assert mask.to_json() == {"size": [height, width], "counts": theirs["counts"].decode()}
    assert np.array_equal(mask.pixels(), pixels) and mask.area == pixels.sum()
    lengths = unpack(mask.counts)
    assert sum(lengths) == height * width and from_counts(lengths, mask.size) == mask
    if pixels.any():
        rows, columns = np.nonzero(pixels)
        assert mask.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


@pytest.mark.parametrize("seed", range(20))
def test_polygons_fill_what_pycocotools_fills(seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts = [rng.uniform(-20, 90, (int(n), 2)) for n in rng.integers(3, 9, 3)]
    mask = Polygons(tuple(parts)).rle((50, 70))
    theirs = coco_mask.frPyObjects([part.ravel().tolist() for part in parts], 50, 70)
    assert mask.to_json()["counts"] == coco_mask.merge(theirs)["counts"].decode()


@pytest.mark.parametrize("text", ["é", "\n", "0P", "PPPPPPPPPPPPPPPPP0", "@"])
def test_text_that_is_no_run_length(text: str) -> None:
    with pytest.raises(ValueError, match="counts"):
        unpack(text)


def test_a_mask_of_another_size() -> None:
    with pytest.raises(ValueError, match="mask of"):
        Rle((4, 5), "d0").rle((5, 4))
