"""Batches are a function of seed and step; augmentation keeps boxes on their objects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from detr.data import Labels, PreprocessConfig, open_dataset
from detr.data.preprocess import shortest_side
from detr.types import ImageArray
from distill.data.augment import AugmentConfig, MultiScaleConfig, _multi_scale_view, augment
from distill.data.batches import Batches

CANVAS = (64, 128)
ON_CANVAS = PreprocessConfig(size=CANVAS)


def labels(boxes: list[list[float]], ignore: list[list[float]] | None = None) -> Labels:
    regions = np.array(ignore or [], dtype=np.float32).reshape(-1, 4)
    return Labels(
        boxes=np.array(boxes, dtype=np.float32).reshape(-1, 4),
        labels=np.arange(len(boxes), dtype=np.int64),
        ignore=regions,
        ignore_labels=np.full(len(regions), -1, dtype=np.int64),
    )


def picture_with(boxes: list[list[float]], size: tuple[int, int]) -> ImageArray:
    """Black, with each box filled in a color of its own."""
    image = np.zeros((*size, 3), dtype=np.uint8)
    for i, (x0, y0, x1, y1) in enumerate(boxes):
        image[int(y0) : int(y1), int(x0) : int(x1), i] = 200
    return image


@pytest.mark.parametrize("seed", range(40))
def test_boxes_stay_on_what_they_enclose(seed: int) -> None:
    boxes = [[20.0, 30.0, 60.0, 70.0], [150.0, 40.0, 200.0, 90.0]]
    image = picture_with(boxes, (100, 240))
    config = AugmentConfig(flip=0.5, zoom=(0.5, 2.5), jitter=0.0)
    view, found = augment(image, labels(boxes), ON_CANVAS, config, np.random.default_rng(seed))
    assert view.shape[0] <= CANVAS[0] and view.shape[1] <= CANVAS[1]
    assert len(found.boxes) + len(found.ignore) >= 1
    for box, label in zip(found.boxes, found.labels, strict=True):
        rows, columns = np.nonzero(view[..., int(label)] >= 100)
        seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose(box, seen, atol=1.5)


def test_what_a_crop_leaves_over_becomes_an_ignore_region() -> None:
    boxes = [[0.0, 0.0, 100.0, 10.0], [0.0, 40.0, 20.0, 60.0]]
    image = np.zeros((100, 240, 3), dtype=np.uint8)
    config = AugmentConfig(flip=0.0, zoom=(4.0, 4.0), jitter=0.0)
    cut = []
    for seed in range(60):
        _, found = augment(image, labels(boxes), ON_CANVAS, config, np.random.default_rng(seed))
        assert len(found.boxes) == len(found.labels)
        assert (found.boxes[:, 2:] > found.boxes[:, :2]).all()
        cut.append(len(found.ignore))
    assert max(cut) >= 1


def test_ignore_regions_move_with_the_image() -> None:
    image = np.zeros((64, 128, 3), dtype=np.uint8)
    config = AugmentConfig(flip=1.0, zoom=(1.0, 1.0), jitter=0.0)
    truth = labels([[0, 0, 10, 10]], ignore=[[100, 20, 128, 40]])
    _, found = augment(image, truth, ON_CANVAS, config, np.random.default_rng(0))
    np.testing.assert_allclose(found.boxes, [[118, 0, 128, 10]])
    np.testing.assert_allclose(found.ignore, [[0, 20, 28, 40]])


def batches(scenes: Path, rank: int = 0, world: int = 1) -> Batches:
    data = open_dataset(f"kitti:{scenes}:train")
    return Batches(data, PreprocessConfig(size=CANVAS), AugmentConfig(), 2, 5, rank, world)


@pytest.mark.slow
def test_a_batch_is_a_function_of_seed_and_step(scenes: Path) -> None:
    straight = list(batches(scenes).stream(0, 6, workers=2))
    later = list(batches(scenes).stream(3, 6, workers=1))
    for first, second in zip(straight[3:], later, strict=True):
        assert first.paths == second.paths
        assert torch.equal(first.images, second.images)
        assert all(
            torch.equal(a.boxes, b.boxes)
            for a, b in zip(first.targets, second.targets, strict=True)
        )
    assert not torch.equal(straight[0].images, straight[1].images)


def test_an_epoch_shows_every_image_once_across_processes(scenes: Path) -> None:
    both = [batches(scenes, rank, 2) for rank in range(2)]
    count = len(both[0].dataset)
    assert count % 4 == 0
    seen = [b.index(step, slot) for step in range(count // 4) for b in both for slot in b.slots]
    assert sorted(seen) == list(range(count))


def test_targets_are_relative_to_the_image_without_padding(scenes: Path) -> None:
    for batch in batches(scenes).stream(0, 8, workers=1):
        for target, size, image in zip(batch.targets, batch.valid_sizes, batch.images, strict=True):
            low = target.boxes[:, :2] - target.boxes[:, 2:] / 2
            high = target.boxes[:, :2] + target.boxes[:, 2:] / 2
            assert (low >= -1e-5).all() and (high <= 1 + 1e-5).all()
            height, width = int(size[0]), int(size[1])
            assert (image[:, height:] == 0).all() and (image[:, :, width:] == 0).all()


DETR = AugmentConfig(multi_scale=MultiScaleConfig(), jitter=0.0)


def test_the_published_view_is_detrs_random_sizes_and_crops() -> None:
    """Every draw within DETR's ranges, both branches seen, each size of the sets taken."""
    assert DETR.zoom is None and DETR.multi_scale is not None
    preprocess = PreprocessConfig(short=800, long=1333)
    shorts, cropped = set(), 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        view = _multi_scale_view((480, 640), preprocess, DETR.multi_scale, 0.5, rng)
        low, high = sorted(view.out)
        assert high <= 1334
        if high < 1330:
            shorts.add(low)
        if view.scaled == (480, 640) == view.window:
            assert view.out == shortest_side(480, 640, low, 1333)
            continue
        cropped += 1
        assert min(view.scaled) in (400, 500, 600)
        for side, limit, start in zip(view.window, view.scaled, view.corner, strict=True):
            assert 384 <= side <= min(600, limit) and 0 <= start <= limit - side
        assert view.out == shortest_side(*view.window, low, 1333) or high > 1330
    assert shorts == set(range(480, 801, 32))
    assert 160 < cropped < 240


@pytest.mark.parametrize("seed", range(20))
def test_boxes_stay_on_what_they_enclose_in_detrs_views(seed: int) -> None:
    boxes = [[20.0, 30.0, 60.0, 70.0], [150.0, 40.0, 200.0, 90.0]]
    image = picture_with(boxes, (100, 240))
    sizes = MultiScaleConfig(short=(60, 80), long=160, crop_short=(70, 90), crop_sides=(48, 80))
    config = AugmentConfig(multi_scale=sizes, jitter=0.0)
    preprocess = PreprocessConfig(short=80, long=160)
    view, found = augment(image, labels(boxes), preprocess, config, np.random.default_rng(seed))
    assert len(found.ignore) == 0  # whatever is left of a box stays an object
    for box, label in zip(found.boxes, found.labels, strict=True):
        rows, columns = np.nonzero(view[..., int(label)] >= 100)
        if len(rows) == 0:  # less than half a pixel is left
            assert (box[2:] - box[:2]).min() < 1.5
            continue
        seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose(box, seen, atol=1.5)


def test_a_view_fits_a_fixed_canvas_and_a_batch_without_one_its_largest_view(scenes: Path) -> None:
    data = open_dataset(f"kitti:{scenes}:train")
    sizes = MultiScaleConfig(short=(64, 80), long=200, crop_short=(70,), crop_sides=(48, 60))
    config = AugmentConfig(multi_scale=sizes)
    for preprocess in (PreprocessConfig(size=(64, 96)), PreprocessConfig(short=64, long=200)):
        shapes = set()
        for step in range(8):
            batch = Batches(data, preprocess, config, 2, 5).batch(step)
            shape = tuple(batch.images.shape[-2:])
            shapes.add(shape)
            largest = batch.valid_sizes.amax(0)
            assert (largest[0] <= shape[0]) and (largest[1] <= shape[1])
            if preprocess.size is None:
                assert tuple(int(x) for x in largest) == shape
        assert (shapes == {(64, 96)}) if preprocess.size else len(shapes) > 1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"multi_scale": True, "zoom": (0.8, 1.2)}, "exclude each other"),
        ({"multi_scale": {"short": [800], "long": 600}}, "more than long"),
        ({"multi_scale": {"crop_sides": [600, 384]}}, "least side first"),
        ({"multi_scale": {"short": []}}, "at least 1 item"),
    ],
)
def test_views_that_contradict_themselves_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        AugmentConfig.model_validate(values)


def test_how_images_vary_is_stored_whole() -> None:
    for config in (AugmentConfig(), AugmentConfig.model_validate({"multi_scale": True})):
        assert AugmentConfig.model_validate_json(config.model_dump_json()) == config
    assert AugmentConfig.model_validate({"multi_scale": False}) == AugmentConfig()
    assert AugmentConfig.model_validate({"zoom": None}).zoom is None
