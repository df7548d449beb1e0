"""Some of the images of a data set."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from detr.data.dataset import Dataset, Labels, Protocols, Scan
from detr.data.images import Header
from detr.data.kitti_rows import KittiLabels, KittiObject
from detr.errors import UserError
from detr.files import TEXT
from detr.types import ImageArray, ImageId


class Subset(Dataset):
    """A data set with fewer images.

    Args:
        whole: The data set.
        indices: Which of its images, in the order they are to have.
        warnings: What to say of those left out.
    """

    def __init__(
        self, whole: Dataset, indices: Sequence[int], warnings: Sequence[UserError] = ()
    ) -> None:
        self._whole, self._indices, self._warnings = whole, indices, warnings
        self.spec, self.classes, self.exif = whole.spec, whole.classes, whole.exif

    def __len__(self) -> int:
        return len(self._indices)

    def image_id(self, i: int) -> ImageId:
        """Of the whole set."""
        return self._whole.image_id(self._indices[i])

    def image_path(self, i: int) -> Path:
        """Path of the picture."""
        return self._whole.image_path(self._indices[i])

    def image_size(self, i: int) -> tuple[int, int]:
        """(height, width)."""
        return self._whole.image_size(self._indices[i])

    def header(self, i: int) -> Header:
        """Of the picture's file."""
        return self._whole.header(self._indices[i])

    def labels(self, i: int) -> Labels:
        """Of the image."""
        return self._whole.labels(self._indices[i])

    def labels_with_masks(self, i: int) -> Labels:
        """Of the image."""
        return self._whole.labels_with_masks(self._indices[i])

    def image(self, i: int) -> ImageArray:
        """``[h, w, 3]`` RGB."""
        return self._whole.image(self._indices[i])

    def scan(self, i: int) -> Scan:
        """Of the image."""
        return self._whole.scan(self._indices[i])

    def scan_with_masks(self, i: int) -> Scan:
        """Of the image."""
        return self._whole.scan_with_masks(self._indices[i])

    def bounds(self, i: int) -> tuple[int, int] | None:
        """Of the image."""
        return self._whole.bounds(self._indices[i])

    def problems(self) -> list[UserError]:
        """Of the whole set."""
        return self._whole.problems()

    def warnings(self) -> list[UserError]:
        """Of the whole set, and what was left out here."""
        return [*self._whole.warnings(), *self._warnings]

    @property
    def value_range(self) -> tuple[float, float] | None:
        """Of the whole set."""
        return self._whole.value_range

    @property
    def protocols(self) -> Protocols:
        """Those of the whole set."""
        kitti = self._whole.protocols.kitti
        return Protocols(kitti=None if kitti is None else _KittiSubset(kitti, self._indices))


class _KittiSubset:
    """KITTI's labels of the images of a subset."""

    def __init__(self, whole: KittiLabels, indices: Sequence[int]) -> None:
        self._whole, self._indices = whole, indices

    def objects(self, i: int) -> list[KittiObject]:
        return self._whole.objects(self._indices[i])

    def sources(self, name: str) -> set[str]:
        return self._whole.sources(name)


def short_names(dataset: Dataset) -> list[str]:
    """A name for each image: its file's, or its path in the data set where that is not enough."""
    paths = [dataset.image_path(i) for i in range(len(dataset))]
    names = [path.name for path in paths]
    if len(set(names)) == len(names):
        return names
    common = Path(os.path.commonpath([path.parent for path in paths]))
    return [path.relative_to(common).as_posix() for path in paths]


def listed(dataset: Dataset, path: Path) -> list[int]:
    """The images a list names, each by the end of its path, with or without its suffix.

    Raises:
        UserError: ``split-missing`` without the list, ``split-row`` where a row names no image,
            several, or one named before.
    """
    try:
        lines = path.read_text(encoding=TEXT).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("split-missing", f"{path}: no list of images: {error}") from error
    images = [dataset.image_path(i).parts for i in range(len(dataset))]
    by_end: dict[int, dict[tuple[str, ...], list[int]]] = {}
    chosen: dict[int, int] = {}
    for number, line in enumerate(lines, start=1):
        if not (name := line.strip()):
            continue
        wanted = Path(name).parts
        if len(wanted) not in by_end:
            ends = by_end[len(wanted)] = {}
            for i, parts in enumerate(images):
                *folders, file = parts[-len(wanted) :]
                for name in {file, Path(file).stem}:
                    ends.setdefault((*folders, name), []).append(i)
        found = by_end[len(wanted)].get(wanted, [])
        if len(found) != 1 or found[0] in chosen:
            what = (
                f"is that of {len(found)} images"
                if len(found) != 1
                else (f"is in line {chosen[found[0]]} already")
            )
            raise UserError("split-row", f"{path}:{number}: {name!r} {what}")
        chosen[found[0]] = number
    return list(chosen)
