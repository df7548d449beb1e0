"""COCO annotation files: what they say, and what is wrong with them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detr.cli_support import counted
from detr.config import ClassMap
from detr.data import fields
from detr.data.formats.base import existing
from detr.errors import UserError
from detr.types import ImageId

ROBOFLOW = "_annotations.coco.json"
_SIDE = 1_000_000  # pixels; more is no picture


def annotation_file(root: Path, split: str | None) -> Path:
    """The annotation file of a split, as COCO or as Roboflow lays it out.

    Args:
        root: Folder with ``annotations/instances_SPLIT*.json`` or ``SPLIT/_annotations.coco.json``,
            or an annotation file itself.
        split: ``train``, ``val``, ...; None where there is only one.

    Raises:
        UserError: ``data-missing`` or ``split-missing``.
    """
    if root.is_file():
        if split is not None:
            raise UserError("split-missing", f"{root}: is one annotation file and has no splits")
        return root
    there = {path.parent.name: path for path in sorted(existing(root).glob(f"*/{ROBOFLOW}"))}
    if not there:
        folder = existing(root / "annotations")
        there = {
            path.stem.removeprefix("instances_").rstrip("0123456789"): path
            for path in sorted(folder.glob("instances_*.json"))
        }
        root = folder
    if split is None and len(there) == 1:
        return next(iter(there.values()))
    if split is None or split not in there:
        names = ", ".join(there) or "none"
        asked = "name a split" if split is None else f"no split {split!r}"
        raise UserError("split-missing", f"{root}: {asked}; there are: {names}")
    return there[split]


@dataclass(frozen=True)
class CocoImage:
    """One image row; ``size`` is (height, width)."""

    id: ImageId
    file_name: str
    size: tuple[int, int]


class CocoFile:
    """A parsed annotation file.

    Attributes:
        path: The file.
        categories: Category id to name.
        images: Image rows whose id and file name occur once, in the file's order.
        annotations: Annotation rows, with their place in the list, by image id.

    Raises:
        UserError: ``data-missing`` or ``coco-json``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        document = _load(path)
        self._categories: list[dict[str, Any]] = _rows(path, document, "categories")
        self.categories = self._named()
        images = [self._image(k, row) for k, row in enumerate(_rows(path, document, "images"))]
        self.annotations: dict[ImageId, list[tuple[int, dict[str, Any]]]] = defaultdict(list)
        self._adrift: list[UserError] = []
        for k, row in enumerate(_rows(path, document, "annotations")):
            try:
                self.annotations[fields.image_id(row, "image_id")].append((k, row))
            except fields.FieldError as error:
                self._adrift.append(UserError("coco-annotation", f"{self.where(k, row)}: {error}"))
        self._ids = Counter(image.id for image in images)
        self._files = Counter(image.file_name for image in images)
        # An entry that is told twice whole is a double of its id alone.
        self._pairs = Counter(name for _, name in {(i.id, i.file_name) for i in images})
        self.images = [
            image for image in images
            if self._ids[image.id] == self._files[image.file_name] == 1
        ]  # fmt: skip

    def where(self, position: int, row: dict[str, Any]) -> str:
        """Names an annotation row: by its id, or by its place where it has none."""
        number = row.get("id")
        if isinstance(number, int):  # as in nearly every row
            return f"{self.path}: annotation {number}"
        name = fields.shown(number) if "id" in row else f"number {position} (without id)"
        return f"{self.path}: annotation {name}"

    def problems(self) -> Iterator[UserError]:
        """Images told twice, annotations of no image, annotation ids told twice."""
        if (total := self._ids.total()) > len(self.images):
            usable = sum(len(self.annotations.get(image.id, [])) for image in self.images)
            yield UserError(
                "image-twice",
                f"{self.path}: {total - len(self.images)} of {total} images share their id or file "
                f"with another, as follows; {counted(len(self.images), 'image')} with "
                f"{counted(usable, 'annotation')} can be used: drop: [image-twice] in a data "
                "YAML",
            )
        for name, count in self._ids.most_common():
            if count > 1:
                yield UserError(
                    "image-twice",
                    f"{self.path}: images: id {fields.shown(name)} is that of {count} entries; "
                    f"{counted(len(self.annotations.get(name, [])), 'annotation')} could be of any",
                )
        for name, count in self._files.most_common():
            if self._pairs[name] > 1:
                yield UserError(
                    "image-twice",
                    f"{self.path}: images: file_name {fields.shown(name)} is that of {count} "
                    "entries; none of them has all its annotations",
                )
        yield from self._adrift
        seen: set[str] = set()
        for image, rows in self.annotations.items():
            for k, row in rows:
                if image not in self._ids:
                    yield UserError(
                        "coco-orphan",
                        f"{self.where(k, row)}: image_id {fields.shown(image)} is not in images",
                    )
                if "id" in row and (number := fields.shown(row["id"])) in seen:
                    yield UserError(
                        "coco-annotation", f"{self.where(k, row)}: the id appears twice"
                    )
                elif "id" in row:
                    seen.add(number)

    def default_classes(self) -> ClassMap:
        """All categories, ordered by id, but for Roboflow's name of the whole."""
        ids = sorted(set(self.categories) - self._groups())
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

    def _named(self) -> dict[int, str]:
        names: dict[int, str] = {}
        for k, row in enumerate(self._categories):
            where = f"{self.path}: categories: entry {k}"
            try:
                number, name = fields.whole(row, "id"), fields.text(row, "name")
            except fields.FieldError as error:
                raise UserError("coco-json", f"{where}: {error}") from error
            if number in names or name in names.values():
                what = f"id {number}" if number in names else f"name {fields.shown(name)}"
                raise UserError("coco-json", f"{where}: the {what} appears twice")
            names[number] = name
        return names

    def _image(self, position: int, row: dict[str, Any]) -> CocoImage:
        try:
            return CocoImage(
                fields.image_id(row, "id"),
                fields.text(row, "file_name"),
                (fields.whole(row, "height", 1, _SIDE), fields.whole(row, "width", 1, _SIDE)),
            )
        except fields.FieldError as error:
            name = f" ({fields.shown(row['file_name'])})" if "file_name" in row else ""
            raise UserError(
                "coco-json", f"{self.path}: images: entry {position}{name}: {error}"
            ) from error

    def _groups(self) -> set[int]:
        """Roboflow's category 0: the name of the whole, in which nothing is annotated."""
        above = [row.get("supercategory") for row in self._categories]
        groups = {
            int(row["id"]) for row in self._categories
            if row["id"] == 0 and row["name"] in above
            and row.get("supercategory") in (None, "none")
        }  # fmt: skip
        used = [row.get("category_id") for rows in self.annotations.values() for _, row in rows]
        return {group for group in groups if group not in used}


def _load(path: Path) -> dict[str, Any]:
    document = fields.read_json(path, "coco-json")
    if not isinstance(document, dict):
        raise UserError("coco-json", f"{path}: not a COCO instances file (no object at the top)")
    return document


def _rows(path: Path, document: dict[str, Any], key: str) -> list[dict[str, Any]]:
    rows = document.get(key)
    if not isinstance(rows, list):
        raise UserError("coco-json", f"{path}: not a COCO instances file (no list {key!r})")
    for k, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError("coco-json", f"{path}: {key}: entry {k} is no object")
    return rows
