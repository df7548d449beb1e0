"""The one place that knows where a training view lies in its image, for pixels, boxes and masks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image
from torchvision.transforms.v2 import functional as transforms

from detr.masks import Mask, Rle
from detr.types import FloatArray

Size = tuple[int, int]
# What a view leaves of a box: enough of it is an object, less is neither object nor background.
KEPT_SHARE = 0.3


@dataclass(frozen=True)
class View:
    """A window of an image, scaled and perhaps mirrored.

    Attributes:
        image: (height, width) of the image.
        scaled: (height, width) it is brought to before the window is taken; often its own.
        corner: (top, left) of the window in the scaled image.
        window: (height, width) of the window in the scaled image.
        out: (height, width) the window is brought to.
        flip: Whether the view is mirrored.
    """

    image: Size
    scaled: Size
    corner: tuple[int, int]
    window: Size
    out: Size
    flip: bool

    def of_picture(self, picture: Image.Image) -> Image.Image:
        """The view's pixels, antialiased bilinear."""
        if self.scaled != self.image:
            picture = transforms.resize(picture, list(self.scaled))
        if (self.window, self.out) != (self.scaled, self.scaled):
            picture = transforms.resized_crop(
                picture, *self.corner, *self.window, size=list(self.out)
            )
        return transforms.horizontal_flip(picture) if self.flip else picture

    def of_boxes(self, boxes: FloatArray) -> tuple[FloatArray, npt.NDArray[np.float64]]:
        """Boxes as the view shows them, and the share of each box's area that it shows.

        Args:
            boxes: ``[N, 4]`` x0 y0 x1 y1 in pixels of the image.

        Returns:
            ``[N, 4]`` float32 in pixels of the view, clipped to it, and ``[N]``.
        """
        enlarged = np.array(self.scaled) / np.array(self.image)
        ratio = np.array(self.out) / np.array(self.window)
        shift = np.array(self.corner)[[1, 0, 1, 0]]
        moved = (boxes * enlarged[[1, 0, 1, 0]] - shift) * ratio[[1, 0, 1, 0]]
        clipped = np.clip(moved, 0, np.array(self.out)[[1, 0, 1, 0]])
        whole = (moved[:, 2:] - moved[:, :2]).prod(1)
        sides = clipped[:, 2:] - clipped[:, :2]
        shown = np.where(sides.min(1, initial=np.inf) > 0, sides.prod(1), 0)
        if self.flip:
            width = self.out[1]
            clipped = np.stack(
                (width - clipped[:, 2], clipped[:, 1], width - clipped[:, 0], clipped[:, 3]), 1
            )
        return clipped.astype(np.float32), shown / np.maximum(whole, 1e-9)

    def of_mask(self, mask: Mask) -> Rle:
        """What the view shows of a mask.

        Corners of polygons move as those of boxes do and are filled in the view's own pixels; of
        run lengths, a pixel of the view takes the value at its center.

        Args:
            mask: Of the image's size.
        """
        ratio = tuple(o / w for o, w in zip(self.out, self.window, strict=True))
        down, right = (-c * r for c, r in zip(self.corner, ratio, strict=True))
        vertical, horizontal = (
            s / i * r for s, i, r in zip(self.scaled, self.image, ratio, strict=True)
        )
        if self.flip:
            right, horizontal = self.out[1] - right, -horizontal
        return mask.moved((vertical, horizontal), (down, right), self.out)
