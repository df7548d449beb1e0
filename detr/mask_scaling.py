"""From mask logits on a coarse map to masks of an image's size, without torch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from detr.masks import Pixels, Rle, Size, encode
from detr.types import FloatArray

# Pixels of the canvas that a cell of the map covers along a side.
STRIDE = 4


def image_masks(logits: FloatArray, valid_size: tuple[float, float], size: Size) -> tuple[Rle, ...]:
    """Masks of one image: where logits, enlarged bilinearly, are above 0.

    Args:
        logits: ``[N, h, w]`` on cells of 4 x 4 pixels of the canvas.
        valid_size: (height, width) of the image inside the canvas, pixels.
        size: (height, width) of the image as read.
    """
    rows, columns = (_places(size[i], valid_size[i], logits.shape[1 + i]) for i in (0, 1))
    return tuple(encode(_enlarged(x, rows, columns)) for x in logits)


_Places = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], FloatArray]


def _places(count: int, valid: float, cells: int) -> _Places:
    """For each pixel along a side the two cells it lies between, and how far along."""
    place = (np.arange(count) + 0.5) * (valid / (count * STRIDE)) - 0.5
    low = np.floor(place)
    share = (place - low).astype(np.float32)
    first = np.clip(low, 0, cells - 1).astype(np.int64)
    second = np.clip(low + 1, 0, cells - 1).astype(np.int64)
    return first, second, share


def _enlarged(x: FloatArray, rows: _Places, columns: _Places) -> Pixels:
    """Where one mask ``[h, w]`` is above 0, ``[H, W]``.

    Only pixels beside a cell above 0 can be, so only those are computed.
    """
    out = np.zeros((len(rows[0]), len(columns[0])), dtype=np.bool_)
    above = x > 0
    spans = []
    for (first, second, _), axis in ((rows, 1), (columns, 0)):
        line: Pixels = np.any(above, axis)
        near = np.flatnonzero(line[first] | line[second])
        if not len(near):
            return out
        spans.append(slice(int(near[0]), int(near[-1]) + 1))
    across, down = spans[1], spans[0]
    top, bottom, share = (part[down] for part in rows)
    lines = x[top] + share[:, None] * (x[bottom] - x[top])
    left, right, share = (part[across] for part in columns)
    inner = lines[:, left] + share * (lines[:, right] - lines[:, left])
    out[down, across] = inner > 0
    return out
