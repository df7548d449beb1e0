"""YOLO folders as Ultralytics reads them: ``data.yaml``, ``images/SPLIT``, ``labels/SPLIT``.

A label row is ``class cx cy w h`` relative to the image, or ``class x y x y x y ...``, a polygon,
which is the object's mask and whose enclosing box is its box. An image without a label file has no
objects.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from detr.config import ClassMap
from detr.data import fields
from detr.data.dataset import Annotation, Box, Scan
from detr.data.formats.base import DataFormat, FileDataset, existing
from detr.data.formats.pairs import by_stem, ids_of
from detr.data.formats.writers import write_yolo
from detr.data.images import SUFFIXES
from detr.data.policy import IGNORE, ClassPolicy
from detr.data.spec import DataSpec, read_yaml
from detr.errors import UserError
from detr.files import TEXT
from detr.masks import Polygons, Size
from detr.types import ImageId

_SPLITS = ("train", "val", "test")
# What labeling programs write into a folder of labels besides.
_NO_LABELS = frozenset({"classes", "labels", "notes"})
# Programs round a box at the border over it by a little; more is no relative value.
_SLACK = 0.01


class YoloFile:
    """A ``data.yaml``: where the images of its splits are, and the classes' names.

    Attributes:
        path: The file.
        names: In the order of their numbers, from 0.

    Raises:
        UserError: ``data-missing`` or ``yolo-yaml``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._content = read_yaml(path, ("path", *_SPLITS, "names"))
        self.names = self._names(self._content.get("names"))
        root = self._content.get("path") or "."
        if not isinstance(root, str):
            raise self._wrong(f"path is {root!r}, not a folder")
        self._root = path.parent / Path(root).expanduser()
        keypoints = self._content.get("kpt_shape")
        self.extra_columns = 0
        if keypoints is not None:
            if not (isinstance(keypoints, list) and all(isinstance(k, int) for k in keypoints)):
                raise self._wrong(f"kpt_shape is {keypoints!r}, not [points, values]")
            self.extra_columns = math.prod(keypoints)

    def places(self, split: str | None) -> list[Path]:
        """Folders of images and lists of images (``.txt``) of a split.

        Raises:
            UserError: ``split-missing``, ``data-missing`` or ``yolo-yaml``.
        """
        there = [name for name in _SPLITS if self._content.get(name)]
        if split is None and len(there) == 1:
            split = there[0]
        if split not in there:
            asked = "name a split" if split is None else f"no split {split!r}"
            raise UserError(
                "split-missing", f"{self.path}: {asked}; there are: {', '.join(there) or 'none'}"
            )
        given = self._content[split]
        entries = given if isinstance(given, list) else [given]
        if not all(isinstance(entry, str) for entry in entries):
            raise self._wrong(f"{split} is {given!r}, not a folder or a list of images")
        return [self._place(entry) for entry in entries]

    def _place(self, entry: str) -> Path:
        place = self._root / Path(entry).expanduser()
        if not place.exists() and entry.startswith("../"):
            # Roboflow's exports: written for a folder that Ultralytics does not keep.
            place = self._root / entry[3:]
        if not place.exists():
            raise UserError("data-missing", f"{self.path}: {entry}: {place} is not there")
        return place

    def _names(self, given: Any) -> tuple[str, ...]:
        if isinstance(given, dict):
            if sorted(given, key=str) != sorted(range(len(given)), key=str):
                raise self._wrong("names: their numbers are not 0, 1, 2, ...")
            given = [given[k] for k in range(len(given))]
        if not isinstance(given, list) or not given:
            raise self._wrong("names is missing, or not a list of class names")
        names = tuple(str(name) for name in given)
        if len(set(names)) < len(names):
            raise self._wrong("names: a name appears twice")
        count = self._content.get("nc", len(names))
        if count != len(names):
            raise self._wrong(f"nc is {count}, but there are {len(names)} names")
        return names

    def _wrong(self, what: str) -> UserError:
        return UserError("yolo-yaml", f"{self.path}: {what}")


class YoloDataset(FileDataset):
    """Images of one split of a ``data.yaml``.

    Args:
        file: The ``data.yaml``.
        source: What the user gave.
        policy: What becomes of the class names.
        spec: For messages.
    """

    def __init__(self, file: YoloFile, source: DataSpec, policy: ClassPolicy, spec: str) -> None:
        super().__init__(source, policy, spec)
        self._file = file
        self._folders: list[Path] = []
        self._paths: list[Path] = []
        for place in file.places(source.split):
            if place.is_dir():
                self._folders.append(place)
                self._paths += sorted(p for p in place.rglob("*") if p.suffix.lower() in SUFFIXES)
            else:
                self._paths += _listed(place, file.path.parent)
        self._paths = list(dict.fromkeys(self._paths))  # a list may name one twice
        if not self._paths:
            raise UserError("data-missing", f"{spec}: no images")
        self._ids = ids_of([path.stem for path in self._paths])
        if len(set(self._ids)) < len(self._ids):
            self._ids = ids_of([str(path) for path in self._paths])

    def __len__(self) -> int:
        return len(self._paths)

    def image_id(self, i: int) -> ImageId:
        """The file's number, or its name where that is none."""
        return self._ids[i]

    def image_path(self, i: int) -> Path:
        """Path of the picture."""
        return self._paths[i]

    def label_path(self, i: int) -> Path:
        """Path of the label file, which need not be there."""
        return _label_path(self._paths[i])

    def read(self, i: int) -> Scan:
        """The rows of image ``i`` as class indices, in pixels."""
        path, found = self.label_path(i), Scan()
        try:
            lines = fields.read_lines(path) if path.exists() else []
            # Relative boxes mean nothing without it.
            height, width = self.image_size(i) if lines else (0, 0)
        except UserError as error:
            found.errors.append(error)
            return found
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                index, box, corners = self._row(line.split(), where)
                label = self.policy.index(self._file.names[index], where)
            except UserError as error:
                found.errors.append(error)
                continue
            # Whole pixels again, where the row was made of such and has enough digits.
            sides = (width, height, width, height)
            x0, y0, x1, y1 = (round(v * side, 6) for v, side in zip(box, sides, strict=True))
            area = max(0.0, x1 - x0) * max(0.0, y1 - y0)
            mask = partial(_mask, corners, (height, width)) if corners else None
            found.annotations.append(
                Annotation(where, (x0, y0, x1, y1), area, label, label == IGNORE, mask=mask)
            )
        return found

    def _row(self, columns: list[str], where: str) -> tuple[int, Box, list[float]]:
        """Class number, relative x0 y0 x1 y1, and x y x y ... of a polygon."""
        count = len(columns) - self._file.extra_columns
        polygon = count >= 7 and count % 2 == 1 and not self._file.extra_columns
        if count != 5 and not polygon:
            more = (
                f" and {self._file.extra_columns} of keypoints" if self._file.extra_columns else ""
            )
            raise UserError(
                "yolo-label-columns",
                f"{where}: {len(columns)} columns, expected 5{more}, or a class and a polygon",
            )
        values = [_number(text, k, where) for k, text in enumerate(columns, start=1)]
        if values[0] != int(values[0]) or not 0 <= values[0] < len(self._file.names):
            raise UserError(
                "category-unknown",
                f"{where}: class {columns[0]} is none of 0 to {len(self._file.names) - 1}",
            )
        coordinates = values[1:] if polygon else values[1:5]
        for k, value in enumerate(coordinates, start=2):
            if not -_SLACK <= value <= 1 + _SLACK and not (value < 0 and not polygon and k >= 4):
                raise UserError(
                    "yolo-label-value",
                    f"{where}: column {k} is {columns[k - 1]}, not relative to the image (0 to 1)",
                )
        if polygon:
            xs, ys = coordinates[::2], coordinates[1::2]
            return int(values[0]), (min(xs), min(ys), max(xs), max(ys)), coordinates
        x, y, w, h = coordinates
        return int(values[0]), (x - w / 2, y - h / 2, x + w / 2, y + h / 2), []

    def read_problems(self) -> list[UserError]:
        """Labels without a picture, and a set without any label file: both are in other folders."""
        labels = {self.label_path(i) for i in range(len(self))}
        if not any(path.exists() for path in labels):
            return [
                UserError(
                    "label-missing",
                    f"{self.spec}: none of {len(self)} images has a label file (first: "
                    f"{self.label_path(0)})",
                )
            ]
        folders = {path.parent for path in labels} if self._folders else set()
        lost = [
            path
            for folder in sorted(folders)
            for stem, path in sorted(by_stem(folder, (".txt",)).items())
            if path not in labels and stem not in _NO_LABELS
        ]
        return [UserError("image-missing", f"{path}: has no image") for path in lost]


def _mask(corners: list[float], size: Size) -> Polygons:
    """Relative x y x y ... in pixels, rounded as boxes are."""
    points = np.array(corners).reshape(-1, 2) * (size[1], size[0])
    return Polygons((points.round(6),))


def _number(text: str, column: int, where: str) -> float:
    value = fields.parse_number(text)
    if math.isnan(value):
        raise UserError("yolo-label-value", f"{where}: column {column} is {text!r}, not a number")
    return value


def _label_path(image: Path) -> Path:
    """``.../images/....jpg`` has its labels in ``.../labels/....txt``, any other beside it."""
    parts = list(image.parts)
    for k in range(len(parts) - 2, -1, -1):
        if parts[k] == "images":
            parts[k] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _listed(path: Path, root: Path) -> Iterator[Path]:
    """Images of a list, relative to its own folder or to that of the ``data.yaml``."""
    try:
        lines = path.read_text(encoding=TEXT).splitlines()
    except (UnicodeDecodeError, OSError) as error:
        raise UserError("split-row", f"{path}: no list of images: {error}") from error
    for line in lines:
        if name := line.strip():
            beside = path.parent / name
            yield beside if beside.exists() or not (root / name).exists() else root / name


def _open(source: DataSpec, classes: ClassMap | None, spec: str) -> YoloDataset:
    file = YoloFile(_data_yaml(source.path))
    own = ClassMap(names=file.names, category_ids=tuple(range(1, len(file.names) + 1)))
    return YoloDataset(file, source, source.policy(classes, own, spec), spec)


def _data_yaml(path: Path) -> Path:
    if path.suffix in (".yaml", ".yml"):
        return path
    if (existing(path) / "data.yaml").is_file():
        return path / "data.yaml"
    there = sorted([*path.glob("*.yaml"), *path.glob("*.yml")])
    if len(there) != 1:
        raise UserError(
            "data-missing", f"{path}: has {len(there)} YAML files; name the data.yaml itself"
        )
    return there[0]


YOLO = DataFormat(name="yolo", spec=DataSpec, open=_open, write=write_yolo)
