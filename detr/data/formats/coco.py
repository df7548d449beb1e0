"""COCO detection folders: ``SPLIT2017/`` and ``annotations/instances_SPLIT2017.json``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from pydantic import model_validator

from detr.config import ClassMap
from detr.data import fields
from detr.data.dataset import Annotation, Scan
from detr.data.formats.base import DataFormat, FileDataset
from detr.data.formats.coco_file import ROBOFLOW, CocoFile, annotation_file
from detr.data.formats.writers import write_coco
from detr.data.policy import IGNORE, ClassPolicy
from detr.data.segmentation import read_segmentation
from detr.data.spec import PlacedSpec
from detr.errors import UserError
from detr.types import ImageId

_BOX = ("x", "y", "width", "height")


class CocoSpec(PlacedSpec):
    """A COCO set, laid out as COCO or Roboflow do it or with its two parts named."""

    @model_validator(mode="after")
    def _one_file(self) -> CocoSpec:
        if self.split is not None and self.annotations is not None:
            raise ValueError("annotations names one file, which has no split: leave out split")
        return self


class CocoDataset(FileDataset):
    """Images of a COCO annotation file; crowds are ignore regions of their class.

    Args:
        file: The annotation file.
        folder: Of the images.
        source: What the user gave.
        policy: What becomes of the category names.
        spec: For messages.
    """

    def __init__(
        self, file: CocoFile, folder: Path, source: CocoSpec, policy: ClassPolicy, spec: str
    ) -> None:
        super().__init__(source, policy, spec)
        self._file, self._folder = file, folder

    def __len__(self) -> int:
        return len(self._file.images)

    def image_id(self, i: int) -> ImageId:
        """The file's image id."""
        return self._file.images[i].id

    def image_path(self, i: int) -> Path:
        """Path of the picture."""
        return self._folder / self._file.images[i].file_name

    def image_size(self, i: int) -> tuple[int, int]:
        """(height, width) as the annotation file has it."""
        return self._file.images[i].size

    def bounds(self, i: int) -> tuple[int, int]:
        """The image size: COCO boxes reach a fraction of a pixel over the border."""
        return self.image_size(i)

    def read(self, i: int) -> Scan:
        """The annotations of image ``i`` as class indices."""
        found = Scan()
        for position, row in self._file.annotations.get(self.image_id(i), []):
            where = self._file.where(position, row)
            try:
                found.annotations.append(self._annotation(i, row, where))
            except fields.FieldError as error:
                found.errors.append(UserError("coco-annotation", f"{where}: {error}"))
            except UserError as error:
                found.errors.append(error)
        return found

    def _annotation(self, i: int, row: dict[str, Any], where: str) -> Annotation:
        category = fields.whole(row, "category_id")
        x, y, w, h = fields.numbers(row, "bbox", _BOX)
        area = w * h if row.get("area") is None else fields.number(row, "area")
        crowd = fields.flag(row, "iscrowd")
        if category not in self._file.categories:
            raise UserError(
                "category-unknown", f"{where}: category_id {category} is not in categories"
            )
        label = self.policy.index(self._file.categories[category], where)
        told = row.get("segmentation")
        mask = partial(read_segmentation, told, self.image_size(i), where) if told else None
        ignore = crowd or label == IGNORE
        return Annotation(where, (x, y, x + w, y + h), area, label, ignore, mask=mask)

    def read_problems(self) -> list[UserError]:
        """Images told twice, annotations of no image, doubled annotation ids."""
        return list(self._file.problems())


def _open(source: CocoSpec, classes: ClassMap | None, spec: str) -> CocoDataset:
    if source.annotations is not None:
        path = source.placed(source.annotations)
    else:
        path = annotation_file(source.path, source.split)
    file = CocoFile(path)
    own = file.default_classes()
    if classes is None and source.classes is not None:
        classes = file.merged_classes(source.classes)
    policy = source.policy(classes, own, spec)
    return CocoDataset(file, _image_folder(source, file), source, policy, spec)


def _image_folder(source: CocoSpec, file: CocoFile) -> Path:
    """Where the pictures lie: as told, as COCO, CVAT or Roboflow have it, or beside the file."""
    if source.images is not None:
        return source.placed(source.images)
    beside, name = file.path.parent, file.path.stem.removeprefix("instances_")
    if file.path.name == ROBOFLOW:
        return beside
    usual = beside.parent / name
    places = [usual, beside.parent / "images" / name, beside.parent / "images", beside]
    first = file.images[0].file_name if file.images else ""
    return next((place for place in places if (place / first).is_file()), usual)


COCO = DataFormat(name="coco", spec=CocoSpec, open=_open, write=write_coco)
