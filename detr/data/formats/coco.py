"""COCO detection folders: ``SPLIT2017/`` and ``annotations/instances_SPLIT2017.json``."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detr.config import ClassMap
from detr.data.dataset import Annotation, Scan
from detr.data.formats.base import DataFormat, FileDataset, existing
from detr.data.policy import IGNORE, ClassPolicy
from detr.data.spec import DataSpec
from detr.errors import UserError
from detr.files import TEXT
from detr.types import ImageId, is_image_id


def annotation_file(root: Path, split: str | None) -> Path:
    """The annotation file of a split.

    Args:
        root: COCO folder, or an annotation file itself.
        split: ``train``, ``val``, ...; None where there is only one.

    Raises:
        UserError: ``data-missing`` or ``split-missing``.
    """
    if root.is_file():
        return root
    folder = existing(existing(root) / "annotations")
    there = {
        path.stem.removeprefix("instances_").rstrip("0123456789"): path
        for path in sorted(folder.glob("instances_*.json"))
    }
    if split is None and len(there) == 1:
        return next(iter(there.values()))
    if split is None or split not in there:
        names = ", ".join(there) or "none"
        asked = "name a split" if split is None else f"no split {split!r}"
        raise UserError("split-missing", f"{folder}: {asked}; there are: {names}")
    return there[split]


class CocoFile:
    """A parsed annotation file, checked as far as reading it needs.

    Attributes:
        path: The file.
        categories: Category id to name.
        images: Image rows in the file's order.
        annotations: Annotation rows by image id.

    Raises:
        UserError: ``data-missing`` or ``coco-json``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        document = _load(path)
        try:
            self.categories = {int(c["id"]): str(c["name"]) for c in document["categories"]}
            self.images: list[dict[str, Any]] = [
                {
                    "id": _image_id(row["id"]),
                    "file_name": str(row["file_name"]),
                    "height": int(row["height"]),
                    "width": int(row["width"]),
                }
                for row in document["images"]
            ]
            self.annotations: dict[ImageId, list[dict[str, Any]]] = defaultdict(list)
            for row in document["annotations"]:
                self.annotations[_image_id(row["image_id"])].append(row)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                "coco-json", f"{path}: not a COCO instances file ({type(error).__name__}: {error})"
            ) from error
        if len({row["id"] for row in self.images}) < len(self.images):
            raise UserError("coco-json", f"{path}: images: an id appears twice")
        if len(set(self.categories.values())) < len(document["categories"]):
            raise UserError("coco-json", f"{path}: categories: an id or a name appears twice")

    def default_classes(self) -> ClassMap:
        """All categories, ordered by id."""
        ids = sorted(self.categories)
        return ClassMap(names=tuple(self.categories[i] for i in ids), category_ids=tuple(ids))

    def merged_classes(self, classes: Mapping[str, list[str]]) -> ClassMap:
        """Classes of a merge map; each takes the category id of its first source in the file."""
        ids = {name: i for i, name in sorted(self.categories.items(), reverse=True)}
        chosen: list[int] = []
        for name, sources in classes.items():
            wanted = sources or [name]
            found = [ids[source] for source in wanted if source in ids]
            if not found:
                raise UserError(
                    "data-yaml",
                    f"{self.path}: class {name!r}: no category is called {' or '.join(wanted)}",
                )
            chosen.append(found[0])
        return ClassMap(names=tuple(classes), category_ids=tuple(chosen))


def _image_id(value: object) -> ImageId:
    if not is_image_id(value):
        raise TypeError(f"image id {value!r} is no whole number and no text")
    return value


def _load(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding=TEXT))
    except OSError as error:
        raise UserError("data-missing", f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError("coco-json", f"{path}: {error}") from error
    if not isinstance(document, dict):
        raise UserError("coco-json", f"{path}: not a COCO instances file (no object at the top)")
    return document


class CocoDataset(FileDataset):
    """Images of a COCO annotation file; crowds are ignore regions of their class.

    Args:
        file: The annotation file.
        policy: What becomes of the category names.
        spec: For messages.
    """

    def __init__(self, file: CocoFile, policy: ClassPolicy, spec: str) -> None:
        super().__init__()
        self.spec = spec
        self.classes = policy.classes
        self._policy = policy
        self._file = file
        self._folder = file.path.parent.parent / file.path.stem.removeprefix("instances_")

    def __len__(self) -> int:
        return len(self._file.images)

    def image_id(self, i: int) -> ImageId:
        """The file's image id."""
        found: ImageId = self._file.images[i]["id"]
        return found

    def image_path(self, i: int) -> Path:
        """Path of the picture in ``SPLIT2017/``."""
        return self._folder / str(self._file.images[i]["file_name"])

    def image_size(self, i: int) -> tuple[int, int]:
        """(height, width) as the annotation file has it."""
        return int(self._file.images[i]["height"]), int(self._file.images[i]["width"])

    def bounds(self, i: int) -> tuple[int, int]:
        """The image size: COCO boxes reach a fraction of a pixel over the border."""
        return self.image_size(i)

    def scan(self, i: int) -> Scan:
        """The annotations of image ``i`` as class indices."""
        found = Scan()
        for row in self._file.annotations.get(self.image_id(i), []):
            try:
                found.annotations.append(self._annotation(row))
            except UserError as error:
                found.errors.append(error)
        return found

    def _annotation(self, row: dict[str, Any]) -> Annotation:
        where = f"{self._file.path}: annotation {row.get('id', '?')}"
        try:
            category = int(row["category_id"])
            x, y, w, h = (float(v) for v in row["bbox"])
            area = float(row.get("area", w * h))
            crowd = bool(row.get("iscrowd", 0))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                "coco-annotation",
                f"{where}: needs category_id and bbox [x, y, width, height] "
                f"({type(error).__name__}: {error})",
            ) from error
        if not all(math.isfinite(v) for v in (x, y, w, h, area)):
            raise UserError("coco-annotation", f"{where}: bbox {row['bbox']} is not finite")
        if category not in self._file.categories:
            raise UserError(
                "category-unknown", f"{where}: category_id {category} is not in categories"
            )
        label = self._policy.index(self._file.categories[category], where)
        return Annotation(where, (x, y, x + w, y + h), area, label, crowd or label == IGNORE)

    def problems(self) -> list[UserError]:
        """Annotations of images that are not listed, doubled annotation ids."""
        path = self._file.path
        listed = {row["id"] for row in self._file.images}
        found = [
            UserError(
                "coco-annotation",
                f"{path}: annotation {row.get('id', '?')}: image_id {image!r} is not in images",
            )
            for image, rows in self._file.annotations.items()
            if image not in listed
            for row in rows
        ]
        seen: set[object] = set()
        for rows in self._file.annotations.values():
            for row in rows:
                number = row.get("id")
                if number in seen:
                    found.append(
                        UserError(
                            "coco-annotation", f"{path}: annotation {number}: the id appears twice"
                        )
                    )
                seen.add(number)
        return found


def _open(source: DataSpec, classes: ClassMap | None, spec: str) -> CocoDataset:
    file = CocoFile(annotation_file(source.path, source.split))
    own = file.default_classes()
    if classes is None and source.classes is not None:
        classes = file.merged_classes(source.classes)
    return CocoDataset(file, source.policy(classes, own, spec), spec)


COCO = DataFormat(name="coco", spec=DataSpec, open=_open)
