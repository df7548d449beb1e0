"""Masks in training batches: they move as the pictures do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from detr.data import Labels, PreprocessConfig, open_dataset
from detr.data.synth import generate
from detr.masks import Mask, Polygons, encode
from distill.data.augment import AugmentConfig, MultiScaleConfig, augment
from distill.data.batches import Batches, target_of

SIZE = (100, 240)
ON_CANVAS = PreprocessConfig(size=(64, 128))
CONFIGS = {
    "zoom": AugmentConfig(flip=0.5, zoom=(0.5, 2.5), jitter=0.0),
    "multi_scale": AugmentConfig(
        flip=0.5,
        multi_scale=MultiScaleConfig(
            short=(40, 56, 64), long=128, crop=0.7, crop_short=(70, 130), crop_sides=(40, 60)
        ),
        jitter=0.0,
    ),
}


def shapes() -> list[npt.NDArray[np.float64]]:
    """A triangle and a slanted bar."""
    return [
        np.array([[20.0, 70.0], [60.0, 65.0], [40.0, 20.0]]),
        np.array([[120.0, 20.0], [220.0, 70.0], [210.0, 90.0], [110.0, 40.0]]),
    ]


def labels(masks: list[Mask]) -> Labels:
    boxes = np.array([mask.box for mask in masks], dtype=np.float32).reshape(-1, 4)
    return Labels(
        boxes=boxes,
        labels=np.arange(len(masks), dtype=np.int64),
        ignore=np.zeros((0, 4), dtype=np.float32),
        ignore_labels=np.zeros(0, dtype=np.int64),
        masks=tuple(masks),
    )


@pytest.mark.parametrize("kind", ["polygons", "run lengths"])
@pytest.mark.parametrize("view", CONFIGS)
@pytest.mark.parametrize("seed", range(15))
def test_masks_stay_on_what_they_cover(kind: str, view: str, seed: int) -> None:
    polygons = [Polygons((shape,)) for shape in shapes()]
    image = np.zeros((*SIZE, 3), dtype=np.uint8)
    for k, mask in enumerate(polygons):
        image[mask.rle(SIZE).pixels(), k] = 200
    masks: list[Mask] = [mask if kind == "polygons" else mask.rle(SIZE) for mask in polygons]
    rng = np.random.default_rng(seed)
    shown, found = augment(image, labels(masks), ON_CANVAS, CONFIGS[view], rng)
    assert found.masks is not None and len(found.masks) == len(found.boxes)
    for shape, label, box in zip(found.masks, found.labels, found.boxes, strict=True):
        mask = shape.rle((shown.shape[0], shown.shape[1]))
        color = shown[..., int(label)]
        assert mask.area
        pixels = mask.pixels()
        # Pixels at the edge are a mixture, and where a polygon's tip is enlarged it is finer than
        # the picture; all others are inside or outside.
        wrong = (pixels & (color < 40)).sum() + (~pixels & (color > 160)).sum()
        assert wrong <= 0.01 * mask.area
        inside = np.array(mask.box) - box
        assert (inside[:2] > -1).all() and (inside[2:] < 1).all()


@pytest.mark.parametrize("view", CONFIGS)
def test_masks_change_nothing_else(view: str) -> None:
    image = np.random.default_rng(0).integers(0, 255, (*SIZE, 3), dtype=np.uint8)
    with_masks = labels([Polygons((shape,)) for shape in shapes()])
    for seed in range(10):
        one, two = (
            augment(image, given, ON_CANVAS, CONFIGS[view], np.random.default_rng(seed))
            for given in (with_masks, replace(with_masks, masks=None))
        )
        assert np.array_equal(one[0], two[0]) and two[1].masks is None
        assert np.array_equal(one[1].boxes, two[1].boxes)
        assert np.array_equal(one[1].ignore, two[1].ignore)


def test_an_object_whose_mask_is_out_of_view_is_none() -> None:
    """Its box reaches into the window, its pixels do not."""
    pixels = np.zeros((64, 128), dtype=np.bool_)
    pixels[:4, :4] = pixels[60:, 124:] = True
    config = AugmentConfig(
        flip=0.0,
        multi_scale=MultiScaleConfig(
            short=(32,), long=64, crop=1.0, crop_short=(64,), crop_sides=(32, 32)
        ),
        jitter=0.0,
    )
    image, kept = np.zeros((64, 128, 3), dtype=np.uint8), []
    for seed in range(30):
        given = labels([encode(pixels)])
        _, found = augment(image, given, ON_CANVAS, config, np.random.default_rng(seed))
        assert len(found.boxes) == len(found.masks or ()) == len(found.labels)
        kept.append(len(found.boxes))
    assert 0 in kept


def test_targets_are_padded_as_the_image_is() -> None:
    mask = np.zeros((3, 5), dtype=np.bool_)
    mask[1, 4] = True
    target = target_of(labels([encode(mask)]), (3, 5), (4, 8))
    assert target.masks is not None
    assert target.masks.dtype == torch.bool and target.masks.shape == (1, 4, 8)
    assert target.masks.nonzero().tolist() == [[0, 1, 4]]
    assert target.to("cpu").masks is not None
    none = target_of(labels([]), (3, 5), (4, 8))
    assert none.masks is not None and none.masks.shape == (0, 4, 8)


def test_batches_with_masks_are_those_without(tmp_path: Path) -> None:
    generate(tmp_path / "s", 6, (48, 160), 1, "coco")
    data = open_dataset(f"coco:{tmp_path / 's'}:train")
    plain, masked = (
        Batches(data, PreprocessConfig(size=(48, 160)), AugmentConfig(), 2, 5, masks=masks)
        for masks in (False, True)
    )
    objects = 0
    for step in range(6):
        one, two = plain.batch(step), masked.batch(step)
        assert torch.equal(one.images, two.images)
        for a, b in zip(one.targets, two.targets, strict=True):
            assert a.masks is None and b.masks is not None
            assert b.masks.shape == (len(b.boxes), 48, 160) and b.masks.flatten(1).any(1).all()
            assert len(b.boxes) <= len(a.boxes) and torch.equal(a.ignore, b.ignore)
            objects += len(b.boxes)
    assert objects
