"""What a data format is, and what readers of files share: cached labels and sizes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from detr.config import ClassMap
from detr.data.box_rules import judge, left_out
from detr.data.dataset import Annotation, Dataset, Labels, Scan, evenly_spaced
from detr.data.formats.writers import Writer
from detr.data.images import Header, read_header, read_image
from detr.data.mask_rules import judge_masks
from detr.data.policy import ClassPolicy
from detr.data.spec import DataSpec
from detr.data.value_range import SAMPLED_IMAGES, Percentiles, measure
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
        write: Writes a data set in this format, if it can.
        lists: Folder of the lists of images that make splits, where the format has such.
    """

    name: str
    spec: type[SpecT]
    open: Callable[[SpecT, ClassMap | None, str], Dataset]
    write: Writer | None = None
    lists: Callable[[SpecT], Path | None] = lambda _: None


class FileDataset(Dataset):
    """A data set in files: image ``i`` has a path and a label file, or a part of one.

    A format tells what its files say in :meth:`read` and :meth:`read_problems`; which of it counts
    is decided here, for all formats alike.

    Args:
        source: What the user gave.
        policy: What becomes of the names in the label files.
        spec: Names the data set in messages.
    """

    def __init__(self, source: DataSpec, policy: ClassPolicy, spec: str) -> None:
        self.spec = spec
        self.classes = policy.classes
        self.policy = policy
        self.exif = source.exif
        self._given_range = source.range
        self._drop = source.drop
        self._labels: dict[int, Labels] = {}
        self._with_masks: dict[int, Labels] = {}
        self._headers: dict[int, Header] = {}

    @abstractmethod
    def read(self, i: int) -> Scan:
        """All annotations of image ``i`` as its file has them; never raises for a bad one."""

    def read_problems(self) -> list[UserError]:
        """What is wrong with the set as a whole: pairs with one half missing, doubled ids."""
        return []

    def problems(self) -> list[UserError]:
        """What is wrong with the set as a whole, but for what the user lets drop."""
        return [error for error in self._all_problems if error.code not in self._drop]

    def warnings(self) -> list[UserError]:
        """What the user lets drop."""
        return [left_out(error) for error in self._all_problems if error.code in self._drop]

    @cached_property
    def _all_problems(self) -> list[UserError]:
        return self.read_problems()

    def scan(self, i: int) -> Scan:
        """The annotations of image ``i`` that count, and what is wrong with the others."""
        return judge(self.read(i), self._size_if_known(i), self.bounds(i), self._drop)

    def scan_with_masks(self, i: int) -> Scan:
        """As :meth:`scan`, and what is wrong with the masks of the objects besides."""
        return judge_masks(self.scan(i), self._mask_size(i), self._drop)

    def header(self, i: int) -> Header:
        """Of the picture's file, read once."""
        if i not in self._headers:
            self._headers[i] = read_header(self.image_path(i))
        return self._headers[i]

    def image_size(self, i: int) -> tuple[int, int]:
        """(height, width), from the file's header."""
        return self.header(i).size(self.exif or "apply")

    def _size_if_known(self, i: int) -> tuple[int, int] | None:
        """Labels can be scored without pictures."""
        try:
            return self.bounds(i) or self.image_size(i)
        except UserError:
            return None

    @property
    def value_range(self) -> tuple[float, float] | None:
        """As the user gave it, or measured on images spread over the set."""
        return self._range

    @cached_property
    def _range(self) -> tuple[float, float] | None:
        given = self._given_range
        if not isinstance(given, Percentiles):
            return given
        sample = evenly_spaced(len(self), SAMPLED_IMAGES)
        paths = [self.image_path(i) for i in sample]
        images = [read_image(path, self.exif or "apply") for path in paths]
        for path, image in zip(paths, images, strict=True):
            if image.dtype == np.uint8:
                raise UserError("image-range", f"{path}: has 8 bits, but a range is given")
        return measure(images, given.percentiles)

    def image(self, i: int) -> ImageArray:
        """``[h, w, 3]`` RGB: uint8, or deeper values where no range is given."""
        return read_image(self.image_path(i), self.exif or "apply", self.value_range)

    def labels(self, i: int) -> Labels:
        """Labels of image ``i``.

        Raises:
            UserError: The first thing wrong with them, naming file and line or annotation.
        """
        if i not in self._labels:
            self._labels[i] = _to_labels(self.annotations(i), self.bounds(i))
        return self._labels[i]

    def labels_with_masks(self, i: int) -> Labels:
        """Labels of image ``i`` whose objects all have masks.

        Raises:
            UserError: The first thing wrong with them, naming file and line or annotation.
        """
        if i not in self._with_masks:
            size = self._mask_size(i)
            masks, kept = [], []
            for row in self.annotations(i, masks=True):
                if not row.ignore and row.mask is not None:
                    mask = row.mask()
                    if not mask.rle(size).area:
                        continue
                    masks.append(mask)
                kept.append(row)
            self._with_masks[i] = replace(_to_labels(kept, self.bounds(i)), masks=tuple(masks))
        return self._with_masks[i]

    def _mask_size(self, i: int) -> tuple[int, int]:
        """(height, width) of an image's masks."""
        return self.bounds(i) or self.image_size(i)


def _to_labels(annotations: list[Annotation], bounds: tuple[int, int] | None) -> Labels:
    boxes = np.array([a.box for a in annotations], dtype=np.float32).reshape(-1, 4)
    if bounds is not None:
        np.clip(boxes, 0, [bounds[1], bounds[0], bounds[1], bounds[0]], out=boxes)
    labels = np.array([a.label for a in annotations], dtype=np.int64)
    ignore = np.array([a.ignore for a in annotations], dtype=bool)
    return Labels(
        boxes=boxes[~ignore],
        labels=labels[~ignore],
        ignore=boxes[ignore],
        ignore_labels=labels[ignore],
    )


def existing(folder: Path) -> Path:
    """The folder, if it is there.

    Raises:
        UserError: ``data-missing``.
    """
    if not folder.is_dir():
        raise UserError("data-missing", f"{folder}: no such folder")
    return folder
