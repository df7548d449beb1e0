"""Training augmentation: a random view, mirrored or not, and color jitter, per-sample seeded.

The view is one of two: a zoom with a random window, or DETR's random sizes and crops. It runs on
PIL images through torchvision's v2 functions: they release the interpreter lock and start no tensor
threads, so samples are made beside the training step. All random choices come from one numpy
generator, so a sample is a pure function of (image, labels, generator).
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from PIL import Image
from pydantic import BeforeValidator, Field, model_validator
from torchvision.transforms.v2 import functional as transforms

from detr.config import Strict
from detr.data.dataset import Labels
from detr.data.preprocess import PreprocessConfig, fit, shortest_side
from detr.types import FloatArray, ImageArray
from distill.data.composed import MixupConfig, MosaicConfig, Share, published
from distill.data.view import KEPT_SHARE, Size, View

# A window that shows no object teaches little; look for another one this many times.
_TRIES = 8

Pixels = Annotated[int, Field(ge=16, le=16384)]
Factor = Annotated[float, Field(ge=0.01, le=100)]


class MultiScaleConfig(Strict):
    """DETR's random sizes and crops, as its code has them (``datasets/coco.py``).

    The short side becomes a random one of ``short``, the long side at most ``long``; with
    probability ``crop`` after the image was brought to a random one of ``crop_short`` and a window
    was cut from it whose sides are random numbers of ``crop_sides``. Every box that the window
    shows any part of stays an object.

    Attributes:
        short: Short sides, pixels.
        long: Largest long side, pixels.
        crop: Probability of a crop.
        crop_short: Short sides before the crop, pixels.
        crop_sides: Least and largest side of the window, pixels.
    """

    short: Annotated[tuple[Pixels, ...], Field(min_length=1)] = tuple(range(480, 801, 32))
    long: Pixels = 1333
    crop: Share = 0.5
    crop_short: Annotated[tuple[Pixels, ...], Field(min_length=1)] = (400, 500, 600)
    crop_sides: tuple[Pixels, Pixels] = (384, 600)

    @model_validator(mode="after")
    def _consistent(self) -> MultiScaleConfig:
        if max(self.short) > self.long:
            raise ValueError(f"short {max(self.short)} is more than long {self.long}")
        if self.crop_sides[0] > self.crop_sides[1]:
            raise ValueError("crop_sides: the least side first")
        return self


class AugmentConfig(Strict):
    """How training images vary: by a zoom, or by DETR's sizes and crops.

    Attributes:
        flip: Probability of a mirror image.
        zoom: Range of the factor on the size that validation takes: above 1 a random window of the
            enlarged image is taken, below 1 the image leaves part of the canvas empty.
        multi_scale: DETR's in place of a zoom; ``true`` takes the published numbers.
        jitter: Largest relative change of brightness, contrast and saturation.
        mosaic: Four images in the place of one; ``true`` takes DEIM's numbers.
        mixup: Two images mixed; ``true`` takes DEIM's numbers.
    """

    flip: Share = 0.5
    zoom: tuple[Factor, Factor] | None = (0.8, 1.5)
    multi_scale: Annotated[MultiScaleConfig | None, BeforeValidator(published)] = None
    jitter: Share = 0.2
    mosaic: Annotated[MosaicConfig | None, BeforeValidator(published)] = None
    mixup: Annotated[MixupConfig | None, BeforeValidator(published)] = None

    @model_validator(mode="before")
    @classmethod
    def _one_view(cls, values: Any) -> Any:
        """DETR's view leaves no room for the zoom that is usual otherwise."""
        if isinstance(values, dict) and values.get("multi_scale") and "zoom" not in values:
            return {**values, "zoom": None}
        return values

    @property
    def of_composed(self) -> AugmentConfig:
        """What still varies in a picture that a mosaic has scaled already."""
        return self.model_copy(update={"zoom": None, "multi_scale": None})

    @model_validator(mode="after")
    def _consistent(self) -> AugmentConfig:
        if self.zoom is not None and self.zoom[0] > self.zoom[1]:
            raise ValueError(f"zoom: {self.zoom[0]:g} is more than {self.zoom[1]:g}")
        if self.zoom is not None and self.multi_scale is not None:
            raise ValueError("zoom and multi_scale exclude each other: set zoom or it to null")
        return self


def augment(
    image: ImageArray,
    labels: Labels,
    preprocess: PreprocessConfig,
    config: AugmentConfig,
    rng: np.random.Generator,
) -> tuple[ImageArray, Labels]:
    """A random view of an image, no larger than a fixed canvas, with its labels.

    Args:
        image: ``[h, w, 3]`` uint8 RGB.
        labels: Boxes in pixels of ``image``.
        preprocess: Size in validation.
        config: What may vary.
        rng: Source of every random choice.

    Returns:
        The view ``[h', w', 3]`` uint8 and its labels in pixels of the view. Boxes that a zoom's
        window cuts to less than 30 % of their area become ignore regions. Masks move with their
        objects, and an object of whose mask the view shows no pixel is none in it. No choice
        depends on masks: with and without, the view is the same.
    """
    size = image.shape[0], image.shape[1]
    if config.multi_scale is not None:
        view = _multi_scale_view(size, preprocess, config.multi_scale, config.flip, rng)
    else:
        view = _zoom_view(size, labels.boxes, preprocess, config, rng)
    picture = view.of_picture(Image.fromarray(image))
    if config.jitter:
        low, high = 1 - config.jitter, 1 + config.jitter
        picture = transforms.adjust_brightness(picture, rng.uniform(low, high))
        picture = transforms.adjust_contrast(picture, rng.uniform(low, high))
        picture = transforms.adjust_saturation(picture, rng.uniform(low, high))

    least = 0.0 if config.multi_scale is not None else KEPT_SHARE
    boxes, share = view.of_boxes(labels.boxes)
    regions, region_share = view.of_boxes(labels.ignore)
    kept, cut = (share >= least) & (share > 0), (share > 0) & (share < least)
    seen = region_share > 0
    masks = None
    if labels.masks is not None:
        of_kept = [view.of_mask(labels.masks[k]) for k in np.flatnonzero(kept)]
        masks = tuple(mask for mask in of_kept if mask.area)
        kept[kept] = [mask.area > 0 for mask in of_kept]
    return np.asarray(picture), Labels(
        boxes=boxes[kept],
        labels=labels.labels[kept],
        ignore=np.concatenate((regions[seen], boxes[cut])),
        ignore_labels=np.concatenate((labels.ignore_labels[seen], labels.labels[cut])),
        masks=masks,
    )


def _zoom_view(
    size: Size,
    boxes: FloatArray,
    preprocess: PreprocessConfig,
    config: AugmentConfig,
    rng: np.random.Generator,
) -> View:
    """The size of validation times a random factor, cut to the room that validation has."""
    fitted = preprocess.scaled(*size)
    zoom = 1.0 if config.zoom is None else float(np.exp(rng.uniform(*np.log(config.zoom))))
    # Without a canvas of its own an image has as much room as it fills.
    room = fitted if preprocess.size is None else preprocess.size
    full = (fitted[0] * zoom, fitted[1] * zoom)
    out = (max(1, min(room[0], round(full[0]))), max(1, min(room[1], round(full[1]))))
    scale = (full[0] / size[0], full[1] / size[1])
    window = (
        min(size[0], max(1, round(out[0] / scale[0]))),
        min(size[1], max(1, round(out[1] / scale[1]))),
    )
    corner = _window_corner(boxes, size, window, rng)
    return View(size, size, corner, window, out, rng.random() < config.flip)


def _multi_scale_view(
    size: Size,
    preprocess: PreprocessConfig,
    config: MultiScaleConfig,
    flip: float,
    rng: np.random.Generator,
) -> View:
    """DETR's view, made to fit where there is a fixed canvas."""
    mirrored = bool(rng.random() < flip)
    scaled = window = size
    corner = (0, 0)
    if rng.random() < config.crop:
        # The code bounds the long side in the sizes only, not before the crop.
        scaled = shortest_side(*size, int(rng.choice(config.crop_short)))
        least, most = config.crop_sides
        window = (
            int(rng.integers(min(least, scaled[0]), min(most, scaled[0]) + 1)),
            int(rng.integers(min(least, scaled[1]), min(most, scaled[1]) + 1)),
        )
        corner = (
            int(rng.integers(0, scaled[0] - window[0] + 1)),
            int(rng.integers(0, scaled[1] - window[1] + 1)),
        )
    out = shortest_side(*window, int(rng.choice(config.short)), config.long)
    room = preprocess.size
    if room is not None and (out[0] > room[0] or out[1] > room[1]):
        out = fit(*out, room)
    return View(size, scaled, corner, window, out, mirrored)


def _window_corner(
    boxes: FloatArray, size: Size, window: Size, rng: np.random.Generator
) -> tuple[int, int]:
    """(top, left) of a window that shows the center of some box, if a few tries find one."""
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    top = left = 0
    for _ in range(_TRIES):
        top = int(rng.integers(0, size[0] - window[0] + 1))
        left = int(rng.integers(0, size[1] - window[1] + 1))
        corner = np.array([left, top])
        inside = (centers >= corner) & (centers < corner + np.array([window[1], window[0]]))
        if len(centers) == 0 or inside.all(1).any():
            break
    return top, left
