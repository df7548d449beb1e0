"""From mask logits on a coarse map to masks of an image's size, without torch."""

from __future__ import annotations

import math
from typing import Annotated, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import Field

from detr.config import Strict
from detr.masks import Rle, Size, encode_part
from detr.types import FloatArray

# Pixels of the canvas that a cell of the map covers along a side.
STRIDE = 4


class MaskScaling(Strict):
    """How the logits of a mask become pixels of the image.

    Enlarged first, then compared: an edge between two cells then lies where the logit crosses the
    threshold and not on the border of a cell.

    Attributes:
        stride: Pixels of the canvas that a cell covers along a side; the center of cell i lies at
            ``(i + 0.5) * stride``.
        enlarge: How logits get to the centers of the image's pixels; beyond the outermost cells'
            centers, those cells' are kept.
        threshold: A pixel belongs to the object where its probability, the sigmoid of its logit,
            is above.
        margin: Only pixels are kept that the detection's box touches after it has grown on every
            side by this share of its width or height. Far pixels belong to other objects of the
            kind; a box that is a little small must not cut its own object off (docs/masks.md).
    """

    stride: Annotated[int, Field(ge=1, le=64)] = STRIDE
    enlarge: Literal["bilinear"] = "bilinear"
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    margin: Annotated[float, Field(ge=0, le=10)] = 0.25

    @property
    def logit(self) -> float:
        """The logit of the threshold."""
        return math.log(self.threshold / (1 - self.threshold))


def image_masks(
    logits: FloatArray,
    boxes: FloatArray,
    valid_size: tuple[float, float],
    size: Size,
    scaling: MaskScaling,
) -> tuple[Rle, ...]:
    """Masks of one image.

    Args:
        logits: ``[N, h, w]`` on the cells of the canvas.
        boxes: ``[N, 4]`` x0 y0 x1 y1 in pixels of the image.
        valid_size: (height, width) of the image inside the canvas, pixels.
        size: (height, width) of the image as read.
        scaling: How they become masks.
    """
    rows, columns = (
        _between(size[i], valid_size[i] / (size[i] * scaling.stride), logits.shape[1 + i])
        for i in (0, 1)
    )
    # A box that is no number has no pixels.
    known = np.nan_to_num(boxes.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    grown = scaling.margin * (known[:, 2:] - known[:, :2])
    most = np.array((size[1], size[0]))
    low = np.floor(known[:, :2] - grown).clip(0, most).astype(np.int64).tolist()
    high = np.ceil(known[:, 2:] + grown).clip(0, most).astype(np.int64).tolist()
    limits = scaling.logit
    return tuple(
        _mask(x, rows.part(y0, y1), columns.part(x0, x1), (x0, y0), size, limits)
        for x, (x0, y0), (x1, y1) in zip(logits, low, high, strict=True)
    )


class _Between(NamedTuple):
    """For each pixel along a side the two cells it lies between, and how far along."""

    first: npt.NDArray[np.int64]
    second: npt.NDArray[np.int64]
    share: FloatArray

    def part(self, low: int, high: int) -> _Between:
        return _Between(self.first[low:high], self.second[low:high], self.share[low:high])


def _between(count: int, cells_per_pixel: float, cells: int) -> _Between:
    place = (np.arange(count) + 0.5) * cells_per_pixel - 0.5
    low = np.floor(place)
    share = (place - low).astype(np.float32)
    first = np.clip(low, 0, cells - 1).astype(np.int64)
    second = np.clip(low + 1, 0, cells - 1).astype(np.int64)
    return _Between(first, second, share)


def _mask(
    x: FloatArray, rows: _Between, columns: _Between, corner: Size, size: Size, limit: float
) -> Rle:
    """Where one mask ``[h, w]``, enlarged, is above a limit, of the pixels given."""
    if not len(rows.share) or not len(columns.share):
        return encode_part(np.zeros((0, 0), np.bool_), corner, size)
    top, left = rows.first[0], columns.first[0]
    cells = x[top : rows.second[-1] + 1, left : columns.second[-1] + 1]
    # Only whole lines of the array in memory are taken by index; columns come out as lines, which
    # is also how run lengths go through them.
    upper = cells[rows.first - top]
    lines = upper + rows.share[:, None] * (cells[rows.second - top] - upper)
    turned = np.ascontiguousarray(lines.T)
    before = turned[columns.first - left]
    pixels = turned[columns.second - left]
    pixels -= before
    pixels *= columns.share[:, None]
    pixels += before
    return encode_part(pixels > limit, corner, size)
