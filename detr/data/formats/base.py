"""What the KITTI and COCO readers share: rows with their place in a file, and cached labels."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from detr.data.dataset import Dataset, Labels
from detr.data.images import read_image, read_size
from detr.errors import UserError
from detr.types import ImageArray

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Row:
    """One object as its label file has it.

    Attributes:
        where: File and line, or file and annotation id.
        box: x0 y0 x1 y1 pixels, not clipped.
        area: Square pixels, of the mask where the file gives one.
        label: Class index; -1 in a region that is ignored for every class.
        ignore: Whether it is an ignore region.
    """

    where: str
    box: Box
    area: float
    label: int
    ignore: bool

    @property
    def empty(self) -> bool:
        """Whether the box has no area."""
        return not (self.box[2] > self.box[0] and self.box[3] > self.box[1])


@dataclass
class Scan:
    """All rows of one image that can be read, and what is wrong with the others."""

    rows: list[Row] = field(default_factory=list)
    errors: list[UserError] = field(default_factory=list)


class FileDataset(Dataset):
    """A data set in files: image ``i`` has a path and a :class:`Scan` of its labels."""

    def __init__(self) -> None:
        self._labels: dict[int, Labels] = {}
        self._sizes: dict[int, tuple[int, int]] = {}

    @abstractmethod
    def scan(self, i: int) -> Scan:
        """Reads all label rows of image ``i`` and never raises for a bad one."""

    @abstractmethod
    def problems(self) -> list[UserError]:
        """What is wrong with the set as a whole: pairs with one half missing, doubled ids."""

    def bounds(self, i: int) -> tuple[int, int] | None:
        """(height, width) that boxes are clipped to, where the labels themselves tell it."""
        return None

    def image_size(self, i: int) -> tuple[int, int]:
        """(height, width), from the file's header."""
        if i not in self._sizes:
            self._sizes[i] = read_size(self.image_path(i))
        return self._sizes[i]

    def image(self, i: int) -> ImageArray:
        """``[h, w, 3]`` uint8 RGB."""
        return read_image(self.image_path(i))

    def labels(self, i: int) -> Labels:
        """Labels of image ``i``; boxes without area are skipped.

        Raises:
            UserError: The first thing wrong with them, naming file and line or annotation.
        """
        if i not in self._labels:
            scan = self.scan(i)
            if scan.errors:
                raise scan.errors[0]
            self._labels[i] = _to_labels(scan.rows, self.bounds(i))
        return self._labels[i]


def _to_labels(rows: list[Row], bounds: tuple[int, int] | None) -> Labels:
    boxes = np.array([row.box for row in rows], dtype=np.float32).reshape(-1, 4)
    if bounds is not None:
        np.clip(boxes, 0, [bounds[1], bounds[0], bounds[1], bounds[0]], out=boxes)
    labels = np.array([row.label for row in rows], dtype=np.int64)
    ignore = np.array([row.ignore for row in rows], dtype=bool)
    solid = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    kept, ignored = solid & ~ignore, solid & ignore
    return Labels(boxes[kept], labels[kept], boxes[ignored], labels[ignored])


def existing(folder: Path) -> Path:
    """The folder, if it is there.

    Raises:
        UserError: ``data-missing``.
    """
    if not folder.is_dir():
        raise UserError("data-missing", f"{folder}: no such folder")
    return folder
