"""What a data format is, and what readers of files share: cached labels and sizes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from detr.config import ClassMap
from detr.data.dataset import Annotation, Dataset, Labels, Scan
from detr.data.images import read_image, read_size
from detr.data.spec import DataSpec
from detr.errors import UserError
from detr.types import ImageArray

SpecT = TypeVar("SpecT", bound=DataSpec)


@dataclass(frozen=True)
class DataFormat(Generic[SpecT]):
    """A way to store a data set, as ``NAME:PATH[:SPLIT]`` or ``format: NAME`` in a YAML opens it.

    Attributes:
        name: Lower-case word before the colon.
        spec: Keys of its YAML; :class:`~detr.data.spec.DataSpec` where path, split and classes say
            all.
        open: Opens a data set. Takes what the user gave, the class map to use (None for the data
            set's own) and the name for messages.
    """

    name: str
    spec: type[SpecT]
    open: Callable[[SpecT, ClassMap | None, str], Dataset]


class FileDataset(Dataset):
    """A data set in files: image ``i`` has a path and a :class:`Scan` of its labels."""

    def __init__(self) -> None:
        self._labels: dict[int, Labels] = {}
        self._sizes: dict[int, tuple[int, int]] = {}

    @abstractmethod
    def scan(self, i: int) -> Scan:
        """Reads all annotations of image ``i`` and never raises for a bad one."""

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
            self._labels[i] = _to_labels(scan.annotations, self.bounds(i))
        return self._labels[i]


def _to_labels(annotations: list[Annotation], bounds: tuple[int, int] | None) -> Labels:
    boxes = np.array([a.box for a in annotations], dtype=np.float32).reshape(-1, 4)
    if bounds is not None:
        np.clip(boxes, 0, [bounds[1], bounds[0], bounds[1], bounds[0]], out=boxes)
    labels = np.array([a.label for a in annotations], dtype=np.int64)
    ignore = np.array([a.ignore for a in annotations], dtype=bool)
    solid = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    kept, ignored = solid & ~ignore, solid & ignore
    return Labels(
        boxes=boxes[kept],
        labels=labels[kept],
        ignore=boxes[ignored],
        ignore_labels=labels[ignored],
    )


def existing(folder: Path) -> Path:
    """The folder, if it is there.

    Raises:
        UserError: ``data-missing``.
    """
    if not folder.is_dir():
        raise UserError("data-missing", f"{folder}: no such folder")
    return folder
