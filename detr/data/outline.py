"""A mask as one polygon, for formats that hold no more."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from detr.masks import Mask, Pixels, Points, Polygons, Size

_Corner = tuple[int, int]


def single_polygon(mask: Mask, size: Size) -> Points:
    """One polygon that fills the same pixels.

    A polygon inside the image stays as it is. Of all else the pixels are outlined, holes too, and
    the outlines are joined by lines that are gone along twice: no pixel lies within them.

    Args:
        mask: Of an image.
        size: The image's (height, width).

    Returns:
        ``[n, 2]`` x y in pixels; empty where the mask has no pixel.
    """
    if isinstance(mask, Polygons) and len(mask.parts) == 1:
        corners = mask.parts[0]
        if (corners >= 0).all() and (corners <= (size[1], size[0])).all():
            return corners
    rings = _outlines(mask.rle(size).pixels())
    if not rings:
        return np.zeros((0, 2))
    start = rings[0][0]
    path = list(rings[0])
    for ring in rings[1:]:
        path += [start, *ring, ring[0]]
    return np.array(path, dtype=np.float64)


def _outlines(pixels: Pixels) -> list[list[_Corner]]:
    """Closed paths (x, y) along the borders of pixels, without corners in a straight line."""
    padded = np.pad(pixels, 1).astype(np.int8)
    onwards: dict[_Corner, list[_Corner]] = defaultdict(list)
    # Where the value changes downwards there is a horizontal border, and so on; with the mask to
    # the right of it.
    down = np.diff(padded, axis=0)[:, 1:-1]
    for y, x in np.argwhere(down).tolist():
        a, b = (x, y), (x + 1, y)
        onwards[a if down[y, x] > 0 else b].append(b if down[y, x] > 0 else a)
    right = np.diff(padded, axis=1)[1:-1]
    for y, x in np.argwhere(right).tolist():
        a, b = (x, y), (x, y + 1)
        onwards[a if right[y, x] < 0 else b].append(b if right[y, x] < 0 else a)
    rings = []
    while onwards:
        first = corner = next(iter(onwards))
        ring: list[_Corner] = []
        while not ring or corner != first:
            ring.append(corner)
            following = onwards[corner].pop()
            if not onwards[corner]:
                del onwards[corner]
            corner = following
        rings.append(_turns(ring))
    return rings


def _turns(ring: list[_Corner]) -> list[_Corner]:
    return [
        corner
        for before, corner, after in zip(
            [ring[-1], *ring], ring, [*ring[1:], ring[0]], strict=False
        )
        if (before[0] == corner[0]) != (corner[0] == after[0])
    ]
