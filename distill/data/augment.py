"""Training augmentation: zoom with a random window, flip and colour jitter, per-sample seeded.

It runs on PIL images through torchvision's v2 functions: they release the interpreter lock and
start no tensor threads, so samples are made beside the training step. All random choices come from
one numpy generator, so a sample is a pure function of (image, labels, generator).
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import Field
from torchvision.transforms.v2 import functional as transforms

from detr.config import Strict
from detr.data.dataset import Labels
from detr.data.preprocess import fit
from detr.types import FloatArray, ImageArray

# What a crop leaves of a box: enough of it is an object, less is neither object nor background.
_KEPT_SHARE = 0.3
# A window that shows no object teaches little; look for another one this many times.
_TRIES = 8

Share = Annotated[float, Field(ge=0, le=1)]


class AugmentConfig(Strict):
    """How training images vary.

    Attributes:
        flip: Probability of a mirror image.
        zoom: Range of the factor on the size that just fits the canvas: above 1 a random window of
            the enlarged image is taken, below 1 the image leaves part of the canvas empty.
        jitter: Largest relative change of brightness, contrast and saturation.
    """

    flip: Share = 0.5
    zoom: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.8, 1.5)
    jitter: Share = 0.2


def augment(
    image: ImageArray,
    labels: Labels,
    canvas: tuple[int, int],
    config: AugmentConfig,
    rng: np.random.Generator,
) -> tuple[ImageArray, Labels]:
    """A random view of an image, no larger than the canvas, with its labels.

    Args:
        image: ``[h, w, 3]`` uint8 RGB.
        labels: Boxes in pixels of ``image``.
        canvas: (height, width) of the network input.
        config: What may vary.
        rng: Source of every random choice.

    Returns:
        The view ``[h', w', 3]`` uint8 and its labels in pixels of the view. Boxes that the window
        cuts to less than 30 % of their area become ignore regions.
    """
    height, width = image.shape[:2]
    fitted = fit(height, width, canvas)
    zoom = float(np.exp(rng.uniform(*np.log(config.zoom))))
    full = (fitted[0] * zoom, fitted[1] * zoom)
    out = (max(1, min(canvas[0], round(full[0]))), max(1, min(canvas[1], round(full[1]))))
    scale = (full[0] / height, full[1] / width)
    window = (min(height, round(out[0] / scale[0])), min(width, round(out[1] / scale[1])))
    top, left = _window_corner(labels.boxes, (height, width), window, rng)

    picture = Image.fromarray(image)
    if (window, out) != ((height, width), (height, width)):
        picture = transforms.resized_crop(picture, top, left, *window, size=list(out))
    flip = rng.random() < config.flip
    if flip:
        picture = transforms.horizontal_flip(picture)
    if config.jitter:
        low, high = 1 - config.jitter, 1 + config.jitter
        picture = transforms.adjust_brightness(picture, rng.uniform(low, high))
        picture = transforms.adjust_contrast(picture, rng.uniform(low, high))
        picture = transforms.adjust_saturation(picture, rng.uniform(low, high))

    ratio = (out[0] / window[0], out[1] / window[1])
    boxes, share = _view(labels.boxes, top, left, ratio, out, flip)
    regions, region_share = _view(labels.ignore, top, left, ratio, out, flip)
    kept, cut = share >= _KEPT_SHARE, (share > 0) & (share < _KEPT_SHARE)
    seen = region_share > 0
    return np.asarray(picture), Labels(
        boxes=boxes[kept],
        labels=labels.labels[kept],
        ignore=np.concatenate((regions[seen], boxes[cut])),
        ignore_labels=np.concatenate((labels.ignore_labels[seen], labels.labels[cut])),
    )


def _window_corner(
    boxes: FloatArray, size: tuple[int, int], window: tuple[int, int], rng: np.random.Generator
) -> tuple[int, int]:
    """(top, left) of a window that shows the centre of some box, if a few tries find one."""
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    top = left = 0
    for _ in range(_TRIES):
        top = int(rng.integers(0, size[0] - window[0] + 1))
        left = int(rng.integers(0, size[1] - window[1] + 1))
        corner = np.array([left, top])
        inside = (centres >= corner) & (centres < corner + np.array([window[1], window[0]]))
        if len(centres) == 0 or inside.all(1).any():
            break
    return top, left


def _view(
    boxes: FloatArray,
    top: int,
    left: int,
    ratio: tuple[float, float],
    out: tuple[int, int],
    flip: bool,
) -> tuple[FloatArray, npt.NDArray[np.float64]]:
    """Boxes as the view shows them, and the share of each box's area that it shows."""
    moved = (boxes - np.array([left, top, left, top])) * np.array([*ratio[::-1], *ratio[::-1]])
    clipped = np.clip(moved, 0, np.array([out[1], out[0], out[1], out[0]]))
    whole = (moved[:, 2:] - moved[:, :2]).prod(1)
    sides = clipped[:, 2:] - clipped[:, :2]
    share = np.where(sides.min(1, initial=np.inf) > 0, sides.prod(1), 0) / np.maximum(whole, 1e-9)
    if flip:
        clipped = np.stack(
            (out[1] - clipped[:, 2], clipped[:, 1], out[1] - clipped[:, 0], clipped[:, 3]), 1
        )
    return clipped.astype(np.float32), share
