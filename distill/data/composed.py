"""Training images made of several: mosaic and mixup, DEIM's dense one-to-one matching.

More objects in an image mean more matched queries in a step without a second matching (Huang et
al., "DEIM: DETR with Improved Matching for Fast Convergence", section 3.2). Numbers are those of
the released code (``engine/data/transforms/mosaic.py``, ``engine/data/dataloader.py``,
``configs/base/deim.yml``). Where that stretches images to squares, these keep their aspect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
from PIL import Image
from pydantic import Field, model_validator
from torchvision.transforms.v2 import functional as transforms

from detr.config import Strict
from detr.data.dataset import Labels
from detr.data.preprocess import PreprocessConfig
from detr.masks import Affine
from detr.types import FloatArray, ImageArray
from distill.data.view import KEPT_SHARE, Size

# Images of a mosaic.
TILES = 4
# An object of which less is left is none, as in the released code (``SanitizeBoundingBoxes``).
_LEAST_SIDE = 1.0

Share = Annotated[float, Field(ge=0, le=1)]


class _Acting(Strict):
    """What acts with a probability in a part of the run.

    Attributes:
        probability: How often.
        between: Shares of the run from and to which it acts. DEIM's own are 4 epochs from the start
            to about half of the run.
    """

    probability: Share = 0.5
    between: tuple[Share, Share] = (0.03, 0.5)

    @model_validator(mode="after")
    def _in_order(self) -> _Acting:
        if self.between[0] >= self.between[1]:
            raise ValueError(f"between: {self.between[0]:g} is no less than {self.between[1]:g}")
        return self

    def acts(self, step: int, steps: int, rng: np.random.Generator) -> bool:
        """Whether it does in a step of a run of ``steps``; draws in every step."""
        first, last = (round(share * steps) for share in self.between)
        return bool(rng.random() < self.probability) and first <= step < last


class MosaicConfig(_Acting):
    """Four images in the place of one, each half as large, turned and scaled together.

    A mosaic takes the place of the zoom or of DETR's sizes and crops.

    Attributes:
        rotation: Largest angle in degrees, either way.
        translation: Largest shift as a share of height and width.
        scale: Range of the factor.
    """

    rotation: Annotated[float, Field(ge=0, le=180)] = 10.0
    translation: Share = 0.1
    scale: tuple[
        Annotated[float, Field(ge=0.1, le=10)],
        Annotated[float, Field(ge=0.1, le=10)],
    ] = (0.5, 1.5)

    @model_validator(mode="after")
    def _consistent(self) -> MosaicConfig:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale: {self.scale[0]:g} is more than {self.scale[1]:g}")
        return self


class MixupConfig(_Acting):
    """Each image of a step mixed with the one before it; the objects are both images'.

    Attributes:
        ratio: Range of the share of an image itself.
    """

    ratio: tuple[Share, Share] = (0.45, 0.55)

    @model_validator(mode="after")
    def _consistent(self) -> MixupConfig:
        if self.ratio[0] > self.ratio[1]:
            raise ValueError(f"ratio: {self.ratio[0]:g} is more than {self.ratio[1]:g}")
        return self


def published(value: object) -> object:
    """``true`` as a section with its defaults, ``false`` as none."""
    return {} if value is True else None if value is False else value


def mosaic(
    images: Sequence[ImageArray],
    labels: Sequence[Labels],
    preprocess: PreprocessConfig,
    config: MosaicConfig,
    rng: np.random.Generator,
) -> tuple[ImageArray, Labels]:
    """Four images as one, no larger than a fixed canvas.

    Each is brought to half the size that validation takes and laid into a quarter of the picture,
    whose sides are those of the largest. The whole is then scaled, turned about its center and
    shifted; what lies outside is black.

    Args:
        images: Four, ``[h, w, 3]`` uint8 RGB.
        labels: Of each, in its pixels.
        preprocess: Size in validation.
        config: What may vary.
        rng: Source of every random choice.

    Returns:
        The picture ``[h', w', 3]`` uint8 and the objects of all four in its pixels: upright boxes
        around their turned ones, cut at the border. Boxes cut to less than 30 % of their area
        become ignore regions, objects of less than a pixel are left out. Masks move along, and an
        object without a pixel left is none.
    """
    factor = float(rng.uniform(*config.scale))
    angle = float(np.deg2rad(rng.uniform(-config.rotation, config.rotation)))
    shift = rng.uniform(-config.translation, config.translation, 2)

    sizes = [(image.shape[0], image.shape[1]) for image in images]
    halves = [tuple(max(1, side // 2) for side in preprocess.scaled(*size)) for size in sizes]
    cell = (max(half[0] for half in halves), max(half[1] for half in halves))
    out = (2 * cell[0], 2 * cell[1])
    # Scaled with the images, whose scaling is antialiased, and not with the turning, which is not.
    step = (max(1, round(cell[0] * factor)), max(1, round(cell[1] * factor)))
    sheet = Image.new("RGB", (2 * step[1], 2 * step[0]))
    turned = _turn(angle, sheet.size, out, shift)

    found = []
    for k, (image, own, half) in enumerate(zip(images, labels, halves, strict=True)):
        tile = [
            min(room, max(1, round(side * factor))) for side, room in zip(half, step, strict=True)
        ]
        corner = np.array([k % 2 * step[1], k // 2 * step[0]], dtype=np.float64)
        picture = transforms.resize(Image.fromarray(image), tile)
        sheet.paste(picture, (int(corner[0]), int(corner[1])))
        ratio = np.array([tile[1] / image.shape[1], tile[0] / image.shape[0]])
        linear = turned[:, :2]
        placed = np.concatenate((linear * ratio, (linear @ corner + turned[:, 2])[:, None]), 1)
        found.append(_moved(own, sizes[k], placed, out))
    back = np.linalg.inv(np.vstack((turned, [0, 0, 1])))[:2]
    picture = sheet.transform(
        (out[1], out[0]),
        Image.Transform.AFFINE,
        tuple(back.ravel().tolist()),
        Image.Resampling.BILINEAR,
    )
    return np.asarray(picture), _joined(found)


def mixed(labels: Sequence[Labels], size: Size) -> Labels:
    """The objects of images that lie over each other, all at the top left.

    Args:
        labels: Of each image.
        size: (height, width) of both together, which masks get.
    """
    return _joined(
        [
            own
            if own.masks is None
            else replace(own, masks=tuple(m.moved((1, 1), (0, 0), size) for m in own.masks))
            for own in labels
        ]
    )


def _joined(labels: Sequence[Labels]) -> Labels:
    """The objects and regions of several images as those of one."""
    of_each = [own.masks for own in labels]
    masks = None if None in of_each else tuple(m for own in of_each for m in own or ())
    return Labels(
        boxes=np.concatenate([own.boxes for own in labels]),
        labels=np.concatenate([own.labels for own in labels]),
        ignore=np.concatenate([own.ignore for own in labels]),
        ignore_labels=np.concatenate([own.ignore_labels for own in labels]),
        masks=masks,
    )


def _turn(angle: float, sheet: tuple[int, int], out: Size, shift: Any) -> Affine:
    """From a sheet (width, height) to a picture whose center is the sheet's, turned and shifted."""
    cos, sin = np.cos(angle), np.sin(angle)
    linear = np.array([[cos, -sin], [sin, cos]])
    center = np.array([out[1], out[0]]) * (0.5 + shift)
    return np.concatenate((linear, (center - linear @ (np.array(sheet) / 2))[:, None]), 1)


def _moved(labels: Labels, size: Size, affine: Affine, out: Size) -> Labels:
    """The labels of an image of a size in a picture ``out``."""
    boxes, share = _boxes(labels.boxes, affine, out)
    regions, region_share = _boxes(labels.ignore, affine, out)
    large = (boxes[:, 2:] - boxes[:, :2]).min(1, initial=np.inf) >= _LEAST_SIDE
    kept, cut = (share >= KEPT_SHARE) & large, (share > 0) & (share < KEPT_SHARE)
    seen = region_share > 0
    masks = None
    if labels.masks is not None:
        of_kept = [labels.masks[k].rle(size).warped(affine, out) for k in np.flatnonzero(kept)]
        masks = tuple(mask for mask in of_kept if mask.area)
        kept[kept] = [mask.area > 0 for mask in of_kept]
    return Labels(
        boxes=boxes[kept],
        labels=labels.labels[kept],
        ignore=np.concatenate((regions[seen], boxes[cut])),
        ignore_labels=np.concatenate((labels.ignore_labels[seen], labels.labels[cut])),
        masks=masks,
    )


def _boxes(boxes: FloatArray, affine: Affine, out: Size) -> tuple[FloatArray, FloatArray]:
    """Upright boxes ``[N, 4]`` around moved ones, cut at the border, and shares ``[N]`` left."""
    corners = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2) @ affine[:, :2].T + affine[:, 2]
    whole = np.concatenate((corners.min(1), corners.max(1)), 1)
    clipped = np.clip(whole, 0, [out[1], out[0], out[1], out[0]])
    left = (clipped[:, 2:] - clipped[:, :2]).prod(1)
    share = left / np.maximum((whole[:, 2:] - whole[:, :2]).prod(1), 1e-9)
    return clipped.astype(np.float32), share.astype(np.float32)
