"""Instance masks as they lie in memory: polygons or run lengths, until somebody needs pixels.

Run lengths are COCO's: pixels column by column, counts of zeros and ones in turns, packed into text
(``maskApi.c`` of the COCO API). faster-coco-eval, a pycocotools in C++, codes them and fills
polygons.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Size = tuple[int, int]
Pair = tuple[float, float]
Pixels = npt.NDArray[np.bool_]
Points = npt.NDArray[np.float64]
# ``[2, 3]``: x y of a point in another image are ``[:, :2] @ (x, y) + [:, 2]``.
Affine = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Rle:
    """A mask as run lengths.

    Attributes:
        size: (height, width) in pixels.
        counts: Packed run lengths as in COCO files.
    """

    size: Size
    counts: str

    @property
    def area(self) -> int:
        """Pixels of the mask."""
        return int(_codec().area(self.to_json()))

    @property
    def box(self) -> tuple[float, float, float, float]:
        """x0 y0 x1 y1 pixels around the mask; all 0 where it is empty."""
        x, y, width, height = _codec().toBbox(self.to_json()).tolist()
        return x, y, x + width, y + height

    def rle(self, size: Size) -> Rle:
        """The mask itself; ``size`` has to be its own.

        Raises:
            ValueError: It is another.
        """
        if size != self.size:
            raise ValueError(f"a mask of {self.size} for an image of {size}")
        return self

    def moved(self, scale: Pair, shift: Pair, out: Size) -> Rle:
        """The mask in another image: a pixel there takes the value at its center.

        Args:
            scale: (vertical, horizontal) factor on pixels of this image; negative to mirror.
            shift: (down, right) pixels of the other image, after scaling.
            out: (height, width) of the other image.
        """
        if scale == (1, 1) and shift == (0, 0) and out == self.size:
            return self
        rows, columns = (
            np.floor((np.arange(n) + 0.5 - by) / times).astype(np.int64)
            for n, times, by in zip(out, scale, shift, strict=True)
        )
        shown = self.pixels()[
            rows.clip(0, self.size[0] - 1)[:, None], columns.clip(0, self.size[1] - 1)
        ]
        shown[(rows < 0) | (rows >= self.size[0])] = False
        shown[:, (columns < 0) | (columns >= self.size[1])] = False
        return encode(shown)

    def warped(self, affine: Affine, out: Size) -> Rle:
        """The mask in an image that an affine map leads to: see :meth:`moved`.

        Args:
            affine: ``[2, 3]`` on x y in pixels of this image, where pixel i reaches from i to
                i + 1; it can be inverted.
            out: (height, width) of the other image.
        """
        back = np.linalg.inv(affine[:, :2])
        y, x = np.mgrid[: out[0], : out[1]] + 0.5
        columns, rows = (
            np.floor(a * (x - affine[0, 2]) + b * (y - affine[1, 2])).astype(np.int64)
            for a, b in back
        )
        inside = (rows >= 0) & (rows < self.size[0]) & (columns >= 0) & (columns < self.size[1])
        shown = np.zeros(out, dtype=np.bool_)
        shown[inside] = self.pixels()[rows[inside], columns[inside]]
        return encode(shown)

    def pixels(self) -> Pixels:
        """``[h, w]`` bool."""
        decoded: npt.NDArray[np.uint8] = _codec().decode(self.to_json())
        return np.ascontiguousarray(decoded).view(np.bool_)

    def to_json(self) -> dict[str, Any]:
        """As ``segmentation`` of a COCO file has it."""
        return {"size": list(self.size), "counts": self.counts}


@dataclass(frozen=True, eq=False)
class Polygons:
    """A mask as the union of polygons; holes cannot be told.

    Attributes:
        parts: ``[n, 2]`` x y in pixels each, where pixel i reaches from i to i + 1. They may pass
            the image's border.
    """

    parts: tuple[Points, ...]

    @property
    def box(self) -> tuple[float, float, float, float]:
        """x0 y0 x1 y1 pixels around all corners."""
        corners = np.concatenate(self.parts)
        x0, y0 = corners.min(0).tolist()
        x1, y1 = corners.max(0).tolist()
        return x0, y0, x1, y1

    def rle(self, size: Size) -> Rle:
        """The part inside an image of a size (height, width)."""
        codec = _codec()
        filled = codec.frPyObjects([part.ravel().tolist() for part in self.parts], *size)
        return _named(codec.merge(filled))

    def moved(self, scale: Pair, shift: Pair, out: Size) -> Rle:
        """The mask in another image, filled in its pixels: see :meth:`Rle.moved`."""
        parts = tuple(part * scale[::-1] + shift[::-1] for part in self.parts)
        return Polygons(parts).rle(out)

    def to_json(self) -> list[list[float]]:
        """As ``segmentation`` of a COCO file has it."""
        return [part.ravel().tolist() for part in self.parts]


Mask = Polygons | Rle


def encode(pixels: Pixels) -> Rle:
    """Run lengths of a mask ``[h, w]``."""
    return _named(_codec().encode(np.asfortranarray(pixels.astype(np.uint8))))


def encode_part(columns: Pixels, corner: tuple[int, int], size: Size) -> Rle:
    """Run lengths of a mask all of whose pixels lie in a window, without the pixels around it.

    Args:
        columns: ``[w, h]`` of the window, column by column.
        corner: x, y of the window's first pixel.
        size: (height, width) of the mask.
    """
    wide, high = columns.shape
    total = size[0] * size[1]
    # One more row of zeros keeps the run at the end of a column apart from the next one's.
    padded = np.zeros((wide, high + 1), np.bool_)
    padded[:, :high] = columns
    flat = padded.reshape(-1)
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    if flat[:1].any():
        edges = np.concatenate((np.zeros(1, edges.dtype), edges))
    column, row = np.divmod(edges, high + 1)
    edges = (column + corner[0]) * size[0] + row + corner[1]
    if high == size[0]:
        # Here a run does go on in the next column.
        first, last = edges[::2], edges[1::2]
        apart = np.append(last[:-1] != first[1:], True)[: len(last)]
        begins = np.concatenate((np.ones(1, np.bool_), apart))[: len(first)]
        edges = np.stack((first[begins], last[apart]), 1).reshape(-1)
    counts = np.diff(edges, prepend=0, append=total).tolist()
    return from_counts(counts[:-1] if len(edges) and not counts[-1] else counts, size)


def of_box(box: tuple[float, float, float, float]) -> Polygons:
    """A box x0 y0 x1 y1 as a mask."""
    x0, y0, x1, y1 = box
    return Polygons((np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)]),))


def intersection(one: Rle, other: Rle) -> Rle:
    """The pixels that two masks of one size have in common."""
    return _named(_codec().merge([one.to_json(), other.rle(one.size).to_json()], 1))


def overlap(one: Rle, other: Rle) -> float:
    """IoU of two masks of one size; two empty ones are equal, so theirs is 1."""
    both = intersection(one, other).area
    either = one.area + other.area - both
    return both / either if either else 1.0


def from_counts(counts: list[int], size: Size) -> Rle:
    """Run lengths from counts that are not packed; they add up to the pixels of the size."""
    height, width = size
    return _named(_codec().frPyObjects({"size": [height, width], "counts": counts}, *size))


def unpack(counts: str) -> list[int]:
    """Packed run lengths as numbers.

    From the fourth on a count is told as its difference to the last but one. Each is a row of
    groups of five bits, the lowest first; a sixth bit says that another group follows, and the
    fifth of the last group is the sign.

    Raises:
        ValueError: This is no such text.
    """
    found: list[int] = []
    value = shift = 0
    for sign in counts.encode():
        group = sign - 48
        if not 0 <= group < 64 or shift > 60:
            raise ValueError("counts hold a sign that is none of COCO's")
        value |= (group & 31) << shift
        shift += 5
        if group & 32:
            continue
        if group & 16:
            value -= 1 << shift
        if len(found) > 2:
            value += found[-2]
        if value < 0:
            raise ValueError("counts hold a negative one")
        found.append(value)
        value = shift = 0
    if shift:
        raise ValueError("counts end too early")
    return found


def _named(coded: dict[str, Any]) -> Rle:
    height, width = coded["size"]
    return Rle((int(height), int(width)), coded["counts"].decode())


def _codec() -> Any:
    # Imported when it is first used: who never sees a mask does not wait for it.
    from faster_coco_eval.core import mask

    return mask
