"""Data sets that are two folders: pictures, and a label file of the same name for each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from detr.data.formats.base import FileDataset
from detr.data.images import SUFFIXES
from detr.data.policy import ClassPolicy
from detr.data.spec import DataSpec
from detr.errors import UserError
from detr.files import TEXT
from detr.types import ImageId


class PairedDataset(FileDataset):
    """Pictures with label files of their own.

    Args:
        images: Folder of the pictures. Without any (labels can be scored without) the label files
            are the images.
        labels: Folder of the label files.
        suffix: Of the label files.
        frames: Names without suffix; None for all there are.
        source: What the user gave.
        policy: What becomes of the names in the label files.
        spec: For messages.

    Raises:
        UserError: ``data-missing`` without any image.
    """

    def __init__(
        self,
        images: Path,
        labels: Path,
        suffix: str,
        frames: list[str] | None,
        source: DataSpec,
        policy: ClassPolicy,
        spec: str,
    ) -> None:
        super().__init__(source, policy, spec)
        self._image_folder, self._label_folder, self._suffix = images, labels, suffix
        self._images = by_stem(images, SUFFIXES)
        self._label_stems = set(by_stem(labels, (suffix,)))
        self._whole = frames is None
        self.frames = sorted(self._images or self._label_stems) if frames is None else frames
        if not self.frames:
            raise UserError("data-missing", f"{spec}: no images in {images}")
        self._ids = ids_of(self.frames)

    def __len__(self) -> int:
        return len(self.frames)

    def image_id(self, i: int) -> ImageId:
        """The frame's number, or its name where that is none."""
        return self._ids[i]

    def image_path(self, i: int) -> Path:
        """Path of the picture."""
        stem = self.frames[i]
        return self._images.get(stem, self._image_folder / f"{stem}.png")

    def label_path(self, i: int) -> Path:
        """Path of the label file."""
        return self._label_folder / f"{self.frames[i]}{self._suffix}"

    def read_problems(self) -> list[UserError]:
        """Labels without a picture (a picture without labels shows when its labels are read)."""
        lost = sorted(self._label_stems - set(self._images)) if self._whole and self._images else []
        return [
            UserError(
                "image-missing",
                f"{self._label_folder / stem}{self._suffix}: has no image in {self._image_folder}",
            )
            for stem in lost
        ]


def by_stem(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Files of a folder by their name without suffix; none where there is no folder."""
    if not folder.is_dir():
        return {}
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes)
    return {path.stem: path for path in reversed(found)}


def ids_of(names: Sequence[str]) -> list[ImageId]:
    """What results files call images that have names and no ids: 000012 is 12, left_12 itself."""
    ids: list[ImageId] = [int(name) if name.isdecimal() else name for name in names]
    return ids if len(set(ids)) == len(ids) else list(names)


def read_split(folder: Path, split: str) -> list[str]:
    """The names in ``SPLIT.txt``.

    Raises:
        UserError: ``split-missing`` or ``split-row``.
    """
    path = folder / f"{split}.txt"
    try:
        lines = path.read_text(encoding=TEXT).splitlines()
    except UnicodeDecodeError as error:
        raise UserError("split-row", f"{path}: not a text file") from error
    except OSError as error:
        there = ", ".join(sorted(p.stem for p in folder.glob("*.txt"))) or "none"
        raise UserError("split-missing", f"{path}: no such split; there are: {there}") from error
    names: list[str] = []
    seen: set[str] = set()
    for number, line in enumerate(lines, start=1):
        name = line.strip()
        if not name:
            continue
        if name in seen or len(name.split()) > 1:
            what = "twice in the split" if name in seen else "not one image's name"
            raise UserError("split-row", f"{path}:{number}: {name!r} is {what}")
        seen.add(name)
        names.append(name)
    return names
