"""BDD100K detection labels (Yu et al., CVPR 2020), and other files of the Scalabel format.

A JSON list of frames, each with its labels; lanes and areas, which have no ``box2d``, are left
alone. Classes, older names of classes, and what counts neither way are the benchmark's: ``crowd``
and ``ignored`` objects, and "other person", "other vehicle" and "trailer" as regions of the class
they are near to. The last pixel of a ``box2d`` is part of it.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from detr.config import ClassMap
from detr.data import fields
from detr.data.dataset import Annotation, Scan
from detr.data.formats.base import DataFormat, FileDataset, existing
from detr.data.policy import IGNORE, ClassPolicy
from detr.data.spec import PlacedSpec
from detr.errors import UserError
from detr.types import ImageId

BDD_CLASSES = ClassMap(
    names=(
        "pedestrian", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
        "traffic light", "traffic sign",
    ),
    category_ids=tuple(range(1, 11)),
)  # fmt: skip
# Names of the first release.
_OLDER = {
    "bike": "bicycle", "caravan": "car", "motor": "motorcycle", "person": "pedestrian",
    "van": "car",
}  # fmt: skip
_NEAR = {"other person": "pedestrian", "other vehicle": "car", "trailer": "truck"}
_FILES = ("det_*.json", "bdd100k_labels_images_*.json")


class BddDataset(FileDataset):
    """Frames of a label file.

    Args:
        path: The label file.
        folder: Of the pictures.
        source: What the user gave.
        policy: What becomes of the categories.
        spec: For messages.

    Raises:
        UserError: ``data-missing``, ``bdd100k-json``.
    """

    def __init__(
        self, path: Path, folder: Path, source: PlacedSpec, policy: ClassPolicy, spec: str
    ) -> None:
        super().__init__(source, policy, spec)
        self._path, self._folder = path, folder
        frames = _frames(path)
        self._counts = Counter(name for name, _ in frames)
        self._frames = [(name, frame) for name, frame in frames if self._counts[name] == 1]

    def __len__(self) -> int:
        return len(self._frames)

    def image_id(self, i: int) -> ImageId:
        """The frame's name."""
        return self._frames[i][0]

    def image_path(self, i: int) -> Path:
        """Path of the picture."""
        return self._folder / self._frames[i][0]

    def read(self, i: int) -> Scan:
        """The boxes of frame ``i`` as class indices."""
        name, frame = self._frames[i]
        found = Scan()
        labels = frame.get("labels") or []
        if not isinstance(labels, list):
            where = f"{self._path}: {name}"
            found.errors.append(UserError("bdd100k-label", f"{where}: labels is no list"))
            return found
        for k, row in enumerate(labels):
            where = f"{self._path}: {name}: label {k}"
            try:
                if not isinstance(row, dict):
                    raise fields.FieldError("is no object")
                if row.get("box2d") is not None:
                    found.annotations.append(self._annotation(row, where))
            except fields.FieldError as error:
                found.errors.append(UserError("bdd100k-label", f"{where}: {error}"))
            except UserError as error:
                found.errors.append(error)
        return found

    def _annotation(self, row: dict[str, Any], where: str) -> Annotation:
        category, box, attributes = (
            fields.text(row, "category"),
            row["box2d"],
            row.get("attributes"),
        )
        if not isinstance(box, dict):
            raise fields.FieldError(f"box2d is {fields.shown(box)}, not x1, y1, x2, y2")
        x0, y0, x1, y1 = (fields.number(box, corner) for corner in ("x1", "y1", "x2", "y2"))
        flags = attributes if isinstance(attributes, dict) else {}
        ignored = fields.flag(flags, "crowd") or fields.flag(flags, "ignored")
        label, near = self._index(category, where)
        area = max(0.0, x1 + 1 - x0) * max(0.0, y1 + 1 - y0)
        return Annotation(
            where, (x0, y0, x1 + 1, y1 + 1), area, label, ignored or near or label == IGNORE
        )

    def _index(self, category: str, where: str) -> tuple[int, bool]:
        """Class index, and whether the category only lies near the class.

        A category that the user names goes where the user says.
        """
        policy = self.policy
        named = category in policy.merged or category in policy.ignored
        if named or category in policy.classes.names:
            return policy.index(category, where), False
        if category in _NEAR:
            return policy.index(_NEAR[category], where), True
        return policy.index(_OLDER.get(category, category), where), False

    def read_problems(self) -> list[UserError]:
        """Frames told twice."""
        return [
            UserError("image-twice", f"{self._path}: frame {name!r} is there {count} times")
            for name, count in self._counts.items()
            if count > 1
        ]


def _frames(path: Path) -> list[tuple[str, dict[str, Any]]]:
    document = fields.read_json(path, "bdd100k-json")
    if isinstance(document, dict):  # Scalabel's own files wrap the list
        document = document.get("frames")
    if not isinstance(document, list):
        raise UserError("bdd100k-json", f"{path}: not a list of frames")
    frames = []
    for k, frame in enumerate(document):
        try:
            if not isinstance(frame, dict):
                raise fields.FieldError("is no object")
            frames.append((fields.text(frame, "name"), frame))
        except fields.FieldError as error:
            raise UserError("bdd100k-json", f"{path}: frame {k}: {error}") from error
    return frames


def _open(source: PlacedSpec, classes: ClassMap | None, spec: str) -> BddDataset:
    path, split = _label_file(source)
    if source.images is not None:
        folder = source.placed(source.images)
    else:
        places = [source.path / "images" / "100k" / split, source.path / "images" / split]
        folder = next((place for place in places if place.is_dir()), places[0])
    policy = source.policy(classes, BDD_CLASSES, spec)
    return BddDataset(path, folder, source, policy, spec)


def _label_file(source: PlacedSpec) -> tuple[Path, str]:
    """The label file, and the name of its split."""
    if source.annotations is not None:
        path = source.placed(source.annotations)
        return path, source.split or _split_of(path)
    if source.path.is_file():
        return source.path, _split_of(source.path)
    labels = existing(existing(source.path) / "labels")
    # The newer labels come first: both releases may lie in one folder.
    there: dict[str, Path] = {}
    for pattern in _FILES:
        for path in sorted(labels.rglob(pattern)):
            there.setdefault(_split_of(path), path)
    split = source.split
    if split is None and len(there) == 1:
        split = next(iter(there))
    if split not in there:
        asked = "name a split" if split is None else f"no split {split!r}"
        raise UserError(
            "split-missing", f"{labels}: {asked}; there are: {', '.join(there) or 'none'}"
        )
    return there[split], split


def _split_of(path: Path) -> str:
    return path.stem.rpartition("_")[2]


BDD100K = DataFormat(name="bdd100k", spec=PlacedSpec, open=_open)
