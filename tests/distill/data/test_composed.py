"""Mosaic and mixup: pictures, boxes and masks of several images stay together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torchvision.transforms.v2 import functional as transforms

from detr.data import Dataset, Labels, PreprocessConfig, open_dataset
from detr.data.synth import generate
from detr.masks import Polygons, encode
from detr.types import ImageArray
from distill.data.augment import AugmentConfig
from distill.data.batches import Batch, Batches
from distill.data.composed import MixupConfig, MosaicConfig, mosaic

ALWAYS = {"probability": 1.0, "between": (0.0, 1.0)}
STILL = {"rotation": 0.0, "translation": 0.0, "scale": (1.0, 1.0)}
CANVAS = (48, 160)


def example(k: int, size: tuple[int, int]) -> tuple[ImageArray, Labels]:
    """An image of the class ``k`` with one object in its first color, drawn by its mask."""
    corners = np.array([[0.3, 0.2], [0.7, 0.3], [0.5, 0.8]]) * np.array(size[::-1])
    mask = Polygons((corners,))
    image = np.zeros((*size, 3), dtype=np.uint8)
    image[mask.rle(size).pixels(), 0] = 200
    image[..., 1] = 100
    return image, Labels(
        boxes=np.array([mask.box], dtype=np.float32),
        labels=np.array([k]),
        ignore=np.array([[0, 0, size[1] / 2, size[0] / 4]], dtype=np.float32),
        ignore_labels=np.array([-1]),
        masks=(mask,),
    )


SIZES = [(100, 240), (120, 120), (80, 300), (200, 100)]
EXAMPLES = [example(k, size) for k, size in enumerate(SIZES)]


def composed(config: dict[str, Any], seed: int, masks: bool = True) -> tuple[ImageArray, Labels]:
    images = [image for image, _ in EXAMPLES]
    labels = [own if masks else replace(own, masks=None) for _, own in EXAMPLES]
    rng = np.random.default_rng(seed)
    return mosaic(images, labels, PreprocessConfig(size=(128, 256)), MosaicConfig(**config), rng)


def test_a_mosaic_that_varies_nothing_is_four_images_side_by_side() -> None:
    preprocess = PreprocessConfig(size=(128, 256))
    picture, found = composed(STILL, 0)
    halves = [tuple(side // 2 for side in preprocess.scaled(*size)) for size in SIZES]
    cell = np.array(halves).max(0)
    direct = np.zeros((2 * cell[0], 2 * cell[1], 3), dtype=np.uint8)
    assert direct.shape[0] <= 128 and direct.shape[1] <= 256
    boxes, regions, polygons = [], [], []
    for k, (image, own) in enumerate(EXAMPLES):
        top, left = k // 2 * cell[0], k % 2 * cell[1]
        tile = transforms.resize(torch.from_numpy(image).permute(2, 0, 1), list(halves[k]))
        direct[top : top + halves[k][0], left : left + halves[k][1]] = tile.permute(1, 2, 0)
        ratio = np.array([halves[k][1] / SIZES[k][1], halves[k][0] / SIZES[k][0]] * 2)
        boxes.append(own.boxes[0] * ratio + [left, top, left, top])
        regions.append(own.ignore[0] * ratio + [left, top, left, top])
        assert own.masks is not None and isinstance(own.masks[0], Polygons)
        polygons.append(Polygons((own.masks[0].parts[0] * ratio[:2] + [left, top],)))
    assert np.abs(picture.astype(int) - direct).max() <= 2
    np.testing.assert_allclose(found.boxes, boxes, atol=1e-4)
    np.testing.assert_allclose(found.ignore, regions, atol=1e-4)
    assert found.labels.tolist() == [0, 1, 2, 3] and found.ignore_labels.tolist() == [-1] * 4
    assert found.masks is not None
    size = (picture.shape[0], picture.shape[1])
    for mask, polygon in zip(found.masks, polygons, strict=True):
        filled = polygon.rle(size).pixels()
        assert (mask.rle(size).pixels() ^ filled).sum() <= 0.1 * filled.sum()


@pytest.mark.parametrize("seed", range(25))
def test_boxes_and_masks_stay_on_what_they_cover(seed: int) -> None:
    picture, found = composed({"translation": 0.3, "rotation": 25.0}, seed)
    red = picture[..., 0]
    assert found.masks is not None and len(found.masks) == len(found.boxes)
    covered = np.zeros(red.shape, dtype=np.bool_)
    for mask, box in zip(found.masks, found.boxes, strict=True):
        assert (box[:2] >= 0).all() and (box[2:] <= [red.shape[1], red.shape[0]]).all()
        pixels = mask.rle((red.shape[0], red.shape[1])).pixels()
        covered |= pixels
        assert (pixels & (red < 40)).sum() <= 0.05 * pixels.sum() + 2
        inside = np.array(mask.rle(picture.shape[:2]).box) - box
        assert (inside[:2] > -1).all() and (inside[2:] < 1).all()
    for x0, y0, x1, y1 in found.ignore:  # what was cut to less than 30 %
        covered[int(y0) : int(y1) + 1, int(x0) : int(x1) + 1] = True
    assert (~covered & (red > 160)).sum() <= 0.01 * (red > 160).sum() + 2


def test_what_the_border_cuts_and_what_is_tiny() -> None:
    cut = left_out = 0
    for seed in range(40):
        _, found = composed({"translation": 0.5, "scale": (0.3, 3.0)}, seed)
        cut += len(found.ignore) > 4
        left_out += len(found.boxes) < 4
        assert ((found.boxes[:, 2:] - found.boxes[:, :2]) >= 1).all()
    assert cut and left_out
    speck = np.zeros(SIZES[0], dtype=np.bool_)
    speck[50, 50] = True
    small = replace(
        EXAMPLES[0][1],
        boxes=np.array([[50, 50, 51, 51]], dtype=np.float32),
        masks=(encode(speck),),
    )
    _, found = mosaic(
        [image for image, _ in EXAMPLES],
        [small, *(own for _, own in EXAMPLES[1:])],
        PreprocessConfig(size=(128, 256)),
        MosaicConfig(**STILL),  # type: ignore[arg-type]
        np.random.default_rng(0),
    )
    assert found.labels.tolist() == [1, 2, 3]


def test_masks_change_nothing_else_in_a_mosaic() -> None:
    for seed in range(10):
        one, two = (composed({}, seed, masks) for masks in (True, False))
        assert np.array_equal(one[0], two[0]) and two[1].masks is None
        assert np.array_equal(one[1].boxes, two[1].boxes)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("composed") / "s"
    generate(folder, 8, CANVAS, 1, "coco")
    return open_dataset(f"coco:{folder}:train")


def batches(
    scenes: Dataset, config: dict[str, Any], size: int = 4, rank: int = 0, world: int = 1
) -> Batches:
    augment = AugmentConfig.model_validate(config)
    preprocess = PreprocessConfig(size=CANVAS)
    return Batches(scenes, preprocess, augment, size, 5, rank, world, masks=True, steps=10)


def same(one: Batch, two: Batch) -> bool:
    return (
        one.paths == two.paths
        and torch.equal(one.images, two.images)
        and torch.equal(one.valid_sizes, two.valid_sizes)
        and all(
            torch.equal(a.boxes, b.boxes)
            and torch.equal(a.labels, b.labels)
            and torch.equal(a.ignore, b.ignore)
            and torch.equal(a.masks, b.masks)  # type: ignore[arg-type]
            for a, b in zip(one.targets, two.targets, strict=True)
        )
    )


BOTH = {"mosaic": {"between": (0.0, 1.0)}, "mixup": {"between": (0.0, 1.0)}}


def test_they_follow_from_seed_and_step(scenes: Dataset) -> None:
    straight = list(batches(scenes, BOTH).stream(0, 6, workers=2))
    later = list(batches(scenes, BOTH).stream(3, 6, workers=1))
    assert all(same(one, two) for one, two in zip(straight[3:], later, strict=True))
    # Both draws came up, and both failed to.
    assert {len(paths) for batch in straight for paths in batch.paths} >= {1, 2, 4, 5}


def test_two_processes_see_what_one_with_all_images_sees(scenes: Dataset) -> None:
    parts = [batches(scenes, BOTH, 2, rank, 2) for rank in range(2)]
    for step in range(6):
        whole = batches(scenes, BOTH).batch(step)
        first, second = (part.batch(step) for part in parts)
        joined = Batch(
            torch.cat((first.images, second.images)),
            torch.cat((first.valid_sizes, second.valid_sizes)),
            [*first.targets, *second.targets],
            [*first.paths, *second.paths],
        )
        assert same(whole, joined)


def test_they_act_in_their_part_of_the_run_alone(scenes: Dataset) -> None:
    part = {"probability": 1.0, "between": (0.2, 0.5)}
    plain = batches(scenes, {})
    for name in ("mosaic", "mixup"):
        acting = batches(scenes, {name: part})
        same_as_plain = [same(plain.batch(step), acting.batch(step)) for step in range(10)]
        assert same_as_plain == [step not in (2, 3, 4) for step in range(10)]


def test_probability_is_how_often(scenes: Dataset) -> None:
    count = 400
    for kind in (MosaicConfig, MixupConfig):
        config = kind(probability=0.3, between=(0.0, 1.0))
        acts = [config.acts(0, 1, np.random.default_rng(seed)) for seed in range(count)]
        assert 0.2 < sum(acts) / count < 0.4
        off = kind(probability=0.0, between=(0.0, 1.0))
        assert not any(off.acts(0, 1, np.random.default_rng(seed)) for seed in range(20))


def test_mixup_is_each_image_and_the_one_before_it(scenes: Dataset) -> None:
    for step in range(3):
        plain = batches(scenes, {}).batch(step)
        half = {**ALWAYS, "ratio": (0.5, 0.5)}
        mixed = batches(scenes, {"mixup": half}).batch(step)
        before = [3, 0, 1, 2]
        expected = (plain.images + plain.images[before]) / 2
        assert torch.allclose(mixed.images, expected, atol=1e-6)
        assert torch.equal(
            mixed.valid_sizes, torch.maximum(plain.valid_sizes, plain.valid_sizes[before])
        )
        for i, k in enumerate(before):
            own, other, both = plain.targets[i], plain.targets[k], mixed.targets[i]
            scale = mixed.valid_sizes[i].flip(0).repeat(2)
            pixels = [
                t.boxes * size.flip(0).repeat(2)
                for t, size in ((own, plain.valid_sizes[i]), (other, plain.valid_sizes[k]))
            ]
            assert torch.allclose(both.boxes * scale, torch.cat(pixels), atol=1e-3)
            assert torch.equal(both.labels, torch.cat((own.labels, other.labels)))
            assert own.masks is not None and other.masks is not None and both.masks is not None
            assert torch.equal(both.masks, torch.cat((own.masks, other.masks)))
            assert mixed.paths[i] == plain.paths[i] + plain.paths[k]
    shares = {batches(scenes, {"mixup": ALWAYS})._mixed(step) for step in range(10)}
    assert len(shares) == 10 and all(share and 0.45 <= share <= 0.55 for share in shares)


def test_a_mosaic_leaves_out_the_zoom(scenes: Dataset) -> None:
    """A zoom would cut and scale what is cut and scaled already."""
    wide = {"flip": 0.0, "jitter": 0.0, "mosaic": ALWAYS}
    one, two = (
        batches(scenes, {**wide, **view}).batch(0)
        for view in ({"zoom": (3.0, 3.0)}, {"multi_scale": True})
    )
    assert same(one, two)


def test_their_part_of_a_run_needs_its_length(scenes: Dataset) -> None:
    config = AugmentConfig.model_validate({"mosaic": True})
    with pytest.raises(ValueError, match="tell its length"):
        Batches(scenes, PreprocessConfig(size=CANVAS), config, 2, 5)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"mosaic": {"between": (0.5, 0.5)}}, "no less than"),
        ({"mosaic": {"scale": (1.5, 0.5)}}, "more than"),
        ({"mixup": {"ratio": (0.6, 0.4)}}, "more than"),
        ({"mixup": {"probability": 1.5}}, "less than or equal to 1"),
    ],
)
def test_contradictions_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        AugmentConfig.model_validate(values)


def test_published_numbers_by_a_word() -> None:
    config = AugmentConfig.model_validate({"mosaic": True, "mixup": True})
    assert (config.mosaic, config.mixup) == (MosaicConfig(), MixupConfig())
    assert AugmentConfig.model_validate_json(config.model_dump_json()) == config
    assert AugmentConfig.model_validate({"mosaic": False, "mixup": False}) == AugmentConfig()


def test_a_damaged_image_of_a_mosaic_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    generate(folder, 6, CANVAS, 1, "coco")
    data = open_dataset(f"coco:{folder}:train")
    damaged = data.image_path(2)
    damaged.write_bytes(damaged.read_bytes()[:600])
    told = set()
    made = batches(data, {"mosaic": ALWAYS}, size=2)
    for step in range(6):
        batch = made.batch(step)
        told |= {path for path, _ in batch.left_out}
        assert all(len(paths) == 4 and damaged not in paths for paths in batch.paths)
    assert told == {damaged}
