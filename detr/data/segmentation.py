"""COCO's ``segmentation``: polygons, run lengths as numbers or packed."""

from __future__ import annotations

from typing import Any

import numpy as np

from detr.data import fields
from detr.data.fields import FieldError
from detr.errors import UserError
from detr.masks import Mask, Polygons, Rle, Size, from_counts, unpack

# In sizes of the image: a corner farther outside is no annotator's, and filling takes the time that
# an outline is long.
_FAR = 10
# Pixels of an image: COCO's codes count them in 32 bits.
_MOST = 2**31


def read_segmentation(value: Any, size: Size, where: str) -> Mask:
    """The mask that a COCO file tells.

    Args:
        value: The row's ``segmentation``.
        size: (height, width) of its image.
        where: Names the row in messages.

    Raises:
        UserError: ``mask-format`` where it is none of the three forms, ``mask-size`` where it is
            for an image of another size.
    """
    if size[0] * size[1] >= _MOST:
        raise UserError("mask-size", f"{where}: an image of {size[1]}x{size[0]} is too large")
    try:
        return polygons(value, size) if isinstance(value, list) else _run_lengths(value, size)
    except FieldError as error:
        raise UserError("mask-format", f"{where}: segmentation: {error}") from error
    except _OtherSizeError as error:
        raise UserError("mask-size", f"{where}: segmentation: {error}") from error


def polygons(value: list[Any], size: Size) -> Polygons:
    """Lists of x y x y ... in pixels.

    Raises:
        FieldError: One is no polygon, or reaches far beyond the image.
    """
    parts = []
    far = _FAR * max(size)
    for number, row in enumerate(value):
        if not isinstance(row, list) or len(row) < 6 or len(row) % 2:
            raise FieldError(f"polygon {number} is no list of x y of at least three corners")
        for v in row:
            if not isinstance(v, int | float) or isinstance(v, bool) or not abs(v) <= far:
                raise FieldError(
                    f"polygon {number} holds {fields.shown(v)}: no number within {far:g}"
                )
        parts.append(np.array(row, dtype=np.float64).reshape(-1, 2))
    if not parts:
        raise FieldError("holds no polygon")
    return Polygons(tuple(parts))


def _run_lengths(value: Any, size: Size) -> Rle:
    if not isinstance(value, dict):
        raise FieldError(f"is {fields.shown(value)}, neither polygons nor run lengths")
    height, width = fields.numbers(value, "size", ("height", "width"))
    if (height, width) != size:
        raise _OtherSizeError(
            f"is for an image of {width:g}x{height:g}, this one is {size[1]}x{size[0]} "
            "(width x height)"
        )
    counts = value.get("counts")
    if isinstance(counts, str):
        try:
            lengths = unpack(counts)
        except ValueError as error:
            raise FieldError(str(error)) from error
    elif isinstance(counts, list):
        if any(not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in counts):
            raise FieldError("counts hold something else than whole numbers from 0 on")
        lengths = counts
    else:
        raise FieldError(f"counts is {fields.shown(counts)}, neither text nor a list")
    if (total := sum(lengths)) != size[0] * size[1]:
        raise FieldError(f"counts add up to {total} pixels, the image has {size[0] * size[1]}")
    return Rle(size, counts) if isinstance(counts, str) else from_counts(lengths, size)


class _OtherSizeError(ValueError):
    """A mask of another image size."""
