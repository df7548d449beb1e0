"""Pascal VOC: an XML file for each picture.

Laid out as the benchmark has it (``JPEGImages``, ``Annotations``, ``ImageSets/Main/SPLIT.txt``), as
Roboflow exports it (``SPLIT`` with pictures and XML files side by side), or with both folders named
in a YAML.

The benchmark itself counts pixels from 1 and means the last one inclusive (Everingham et al., The
Pascal Visual Object Classes Challenge: development kit); labeling programs write corners, from 0.
A file says of which kind it is by its database.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Literal

from detr.cli_support import progress
from detr.config import ClassMap
from detr.data import fields
from detr.data.dataset import Annotation, Scan
from detr.data.formats.base import DataFormat, existing
from detr.data.formats.pairs import PairedDataset, by_stem, read_split
from detr.data.formats.writers import write_voc
from detr.data.policy import IGNORE, ClassPolicy
from detr.data.spec import PlacedSpec
from detr.data.xml_rows import Element, read_xml
from detr.errors import UserError

_BENCHMARK = re.compile(r"the voc ?20\d\d database", re.IGNORECASE)
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


class VocSpec(PlacedSpec):
    """A VOC set.

    Attributes:
        first_pixel: 1 where boxes count pixels from 1, last one inclusive, 0 where they are
            corners; None goes by each file's ``source/database``.
    """

    first_pixel: Literal[0, 1] | None = None


class VocDataset(PairedDataset):
    """Pictures with an XML file each; ``difficult`` objects are ignore regions of their class.

    Args:
        images, labels: The folders.
        frames: Names of the split's images; None for all.
        source: What the user gave.
        policy: What becomes of the class names.
        spec: For messages.
    """

    def __init__(
        self,
        images: Path,
        labels: Path,
        frames: list[str] | None,
        source: VocSpec,
        policy: ClassPolicy,
        spec: str,
    ) -> None:
        super().__init__(images, labels, ".xml", frames, source, policy, spec)
        self._first_pixel = source.first_pixel
        self._claims: dict[int, tuple[int, int] | None] = {}

    def bounds(self, i: int) -> tuple[int, int] | None:
        """The size that the XML file gives; programs write 0 where they do not know it."""
        if i not in self._claims:
            try:
                self._claims[i] = _size(read_xml(self.label_path(i)))
            except UserError:  # told when the labels are read
                self._claims[i] = None
        return self._claims[i]

    def read(self, i: int) -> Scan:
        """The objects of image ``i`` as class indices."""
        path, found = self.label_path(i), Scan()
        try:
            root = read_xml(path)
            if root.tag != "annotation":
                raise UserError("voc-object", f"{path}:{root.line}: <{root.tag}> is no annotation")
        except UserError as error:
            found.errors.append(error)
            return found
        first = self._first_pixel
        if first is None:
            database = root.find("source/database")
            first = 1 if database and _BENCHMARK.search(database.text) else 0
        for element in root.all("object"):
            where = f"{path}:{element.line}"
            try:
                found.annotations.append(self._object(element, where, first))
            except UserError as error:
                found.errors.append(error)
        return found

    def _object(self, element: Element, where: str, first: int) -> Annotation:
        label = self.policy.index(_text(element, "name", where), where)
        x0, y0, x1, y1 = (_number(element, f"bndbox/{corner}", where) for corner in _CORNERS)
        difficult = element.find("difficult")
        flag = difficult.text.strip() if difficult else "0"
        if flag not in ("0", "1"):
            raise UserError("voc-object", f"{where}: difficult is {flag!r}, not 0 or 1")
        box = (x0 - first, y0 - first, x1, y1)
        area = max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])
        return Annotation(where, box, area, label, flag == "1" or label == IGNORE)


def _size(root: Element) -> tuple[int, int] | None:
    sides = []
    for side in ("size/height", "size/width"):
        element = root.find(side)
        text = element.text.strip() if element else ""
        sides.append(int(text) if text.isdecimal() else 0)
    return (sides[0], sides[1]) if min(sides) > 0 else None


def _text(element: Element, path: str, where: str) -> str:
    found = element.find(path)
    if found is None or not found.text.strip():
        raise UserError("voc-object", f"{where}: {path} is missing")
    return found.text.strip()


def _number(element: Element, path: str, where: str) -> float:
    text = _text(element, path, where)
    value = fields.parse_number(text)
    if math.isnan(value):
        raise UserError("voc-object", f"{where}: {path} is {text!r}, not a number")
    return value


def class_names(folder: Path) -> tuple[str, ...]:
    """Every class in a folder of XML files, sorted; those of the benchmark's 20 are so anyway.

    Of all files and not of a split's: training and validation must agree. Files that cannot be read
    are told when their labels are.
    """
    names: set[str] = set()
    paths = by_stem(folder, (".xml",)).values()
    for path in progress(paths, f"classes in {folder}", total=len(paths)):
        try:
            for element in read_xml(path).all("object"):
                name = element.find("name")
                if name is not None and name.text.strip():
                    names.add(name.text.strip())
        except UserError:
            continue
    return tuple(sorted(names))


def _open(source: VocSpec, classes: ClassMap | None, spec: str) -> VocDataset:
    images, labels, frames = _layout(source)
    own = ClassMap(names=(), category_ids=())
    if classes is None and source.classes is None:
        names = class_names(labels)
        own = ClassMap(names=names, category_ids=tuple(range(1, len(names) + 1)))
    policy = source.policy(classes, own, spec)
    return VocDataset(images, labels, frames, source, policy, spec)


def _layout(source: VocSpec) -> tuple[Path, Path, list[str] | None]:
    """Folders of pictures and of XML files, and the names of the split's images."""
    root, split = source.path, source.split
    if source.images is not None or source.annotations is not None:
        images = source.placed(source.images or source.annotations or Path())
        labels = source.placed(source.annotations or source.images or Path())
        frames = None if split is None else read_split(root / "ImageSets" / "Main", split)
        return images, existing(labels), frames
    existing(root)
    if (root / "Annotations").is_dir():
        frames = None if split is None else read_split(root / "ImageSets" / "Main", split)
        return root / "JPEGImages", root / "Annotations", frames
    there = sorted(
        path.name for path in root.iterdir() if path.is_dir() and any(path.glob("*.xml"))
    )
    if split is None and any(root.glob("*.xml")):
        return root, root, None
    if split is None and len(there) == 1:
        split = there[0]
    if split not in there:
        asked = "name a split" if split is None else f"no split {split!r}"
        raise UserError(
            "split-missing", f"{root}: {asked}; there are: {', '.join(there) or 'none'}"
        )
    return root / split, root / split, None


def _lists(source: VocSpec) -> Path | None:
    lists = source.path / "ImageSets" / "Main"
    return lists if (source.path / "Annotations").is_dir() else None


VOC = DataFormat(name="voc", spec=VocSpec, open=_open, write=write_voc, lists=_lists)
