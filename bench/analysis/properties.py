"""What objects and images can be sliced by: what labels tell, and a user's own table."""

from __future__ import annotations

import bisect
import csv
import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from detr.data.coco_document import annotation_rows
from detr.data.dataset import Annotation, Dataset
from detr.data.kitti_rows import OCCLUSIONS
from detr.errors import UserError
from detr.files import TEXT

# COCO's sizes, in square pixels of the original image.
SIZES = (("small (< 32²)", 0), ("medium (32² – 96²)", 32**2), ("large (> 96²)", 96**2))
# KITTI's difficulties allow 0.15, 0.3 and 0.5.
_TRUNCATIONS = (0.0, 0.15, 0.3, 0.5)
_DISTANCES = (10.0, 20.0, 30.0, 50.0)
_MOST_VALUES = 10  # of a column of numbers, before it is cut into quarters
_MISSING = "(not told)"


@dataclass(frozen=True)
class Property:
    """A property with a value for each object or image.

    Attributes:
        by: Its name.
        of: Whether of objects or of images.
        values: In the document's order.
        order: All of them, as they are to be shown.
    """

    by: str
    of: Literal["objects", "images"]
    values: list[str | None]
    order: list[str]


def size_of(area: float) -> str:
    """Name of a size."""
    return next(name for name, least in reversed(SIZES) if area >= least or least == 0)


def label_properties(dataset: Dataset, indices: Sequence[int]) -> list[Property]:
    """Size, class, and what the labels tell of occlusion, truncation and distance."""
    rows = [
        (None, None) if row.ignore else (label, row)
        for _, label, row in annotation_rows(dataset, indices)
    ]
    names = dataset.classes.names
    sizes = [None if row is None else size_of(row.area) for _, row in rows]
    classes = [None if label is None else names[label] for label, _ in rows]
    found = [
        *_told("box size", sizes, [name for name, _ in SIZES]),
        *_told("class", classes, list(names)),
    ]
    told = [{} if row is None else row.attributes for _, row in rows]
    words = [_text(one.get("occlusion")) for one in told]
    found += _told("occlusion", words, list(OCCLUSIONS.values()))
    for name, cuts, unit in (("truncation", _TRUNCATIONS, ""), ("distance", _DISTANCES, " m")):
        numbers = [_number(one.get(name)) for one in told]
        place, order = _cut(cuts, unit)
        found += _told(name, [None if v is None else place(v) for v in numbers], order)
    return found


def _told(by: str, values: list[str | None], order: list[str]) -> list[Property]:
    """The property with the values that occur, if one does."""
    order = [value for value in order if value in set(values)]
    return [Property(by, "objects", values, order)] if order else []


def _text(value: float | str | None) -> str | None:
    return value if isinstance(value, str) else None


def _number(value: float | str | None) -> float | None:
    return value if isinstance(value, float) else None


def _cut(cuts: Sequence[float], unit: str) -> tuple[Callable[[float], str], list[str]]:
    """Names for the spans between cuts, each with its upper end."""
    order = [f"≤ {cuts[0]:g}{unit}" if cuts[0] else "0"]
    order += [f"{a:g} – {b:g}{unit}" for a, b in itertools.pairwise(cuts)]
    order.append(f"> {cuts[-1]:g}{unit}")
    return lambda value: order[bisect.bisect_left(cuts, value)], order


def table_properties(path: Path, dataset: Dataset, indices: Sequence[int]) -> list[Property]:
    """The columns of a CSV file: a property each.

    A column ``image`` names the image (its id, file name or name without suffix). With a column
    ``object`` (the line of the label file, or the annotation's id) the rows are of objects, else of
    images. Numbers of more than ten different values are cut at their quartiles.

    Args:
        path: The file.
        dataset: Whose images.
        indices: Those that are measured; rows of others are left alone.

    Raises:
        UserError: ``slices-file`` naming file and line.
    """
    try:
        with path.open(newline="", encoding=TEXT) as file:
            reader = csv.DictReader(file)
            columns = list(reader.fieldnames or ())
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError("slices-file", f"{path}: {error}") from error
    names = [column for column in columns if column not in ("image", "object")]
    if "image" not in columns or not names or len(set(columns)) < len(columns):
        raise UserError(
            "slices-file",
            f"{path}:1: needs a column image, at most one named object, and others by their own "
            f"names, not {', '.join(columns) or 'nothing'}",
        )
    of: Literal["objects", "images"] = "objects" if "object" in columns else "images"
    known = _image_names(dataset)
    cells: dict[tuple[int, str], dict[str, str]] = {}
    for line, row in rows:
        if None in row or None in row.values():
            raise UserError("slices-file", f"{path}:{line}: not {len(columns)} columns")
        image = known.get(row["image"])
        if image is None:
            which = "is several images'" if row["image"] in known else f"is not in {dataset.spec}"
            raise UserError("slices-file", f"{path}:{line}: image {row['image']!r} {which}")
        key = image, row.get("object", "")
        if key in cells:
            raise UserError("slices-file", f"{path}:{line}: the same {of[:-1]} a second time")
        cells[key] = {name: row[name].strip() for name in names}
    if of == "images":
        places = [(i, "") for i in indices]
    else:
        places = [(i, object_number(row)) for i, _, row in annotation_rows(dataset, indices)]
        every = {(i, object_number(row)) for i, _, row in annotation_rows(dataset)}
        for (image, number), (line, _) in zip(cells, rows, strict=True):
            if (image, number) not in every:
                where = dataset.image_path(image).name
                raise UserError("slices-file", f"{path}:{line}: {where} has no object {number!r}")
    found = []
    for name in names:
        told = [cells.get(place, {}).get(name, "") for place in places]
        values, order = _values(told)
        found.append(Property(name, of, list(values), order))
    return found


def object_number(annotation: Annotation) -> str:
    """The line or id at the end of where an annotation stands."""
    match = re.search(r"(\d+)$", annotation.where)
    return match[1] if match else annotation.where


def _image_names(dataset: Dataset) -> dict[str, int | None]:
    """Images by id, file name and name without suffix; None where that is several images'."""
    known: dict[str, int | None] = {}
    for i in range(len(dataset)):
        path = dataset.image_path(i)
        for name in {str(dataset.image_id(i)), path.name, path.stem}:
            known[name] = i if name not in known else None
    return known


def _values(told: Sequence[str]) -> tuple[list[str], list[str]]:
    """Cells in words, and all words in their order: numbers by size, text by the alphabet."""
    distinct = sorted({text for text in told if text})
    numbers = _numbers(distinct)
    if numbers is None:
        order = distinct
        values = [text or _MISSING for text in told]
    elif len(set(numbers)) <= _MOST_VALUES:
        order = sorted(distinct, key=float)
        values = [text or _MISSING for text in told]
    else:
        every = [float(text) for text in told if text]
        cuts = sorted({float(f"{q:.4g}") for q in np.quantile(every, [0.25, 0.5, 0.75])})
        place, order = _cut(cuts, "")
        values = [place(float(text)) if text else _MISSING for text in told]
    return values, [*order, *([_MISSING] if _MISSING in values else [])]


def _numbers(texts: Iterable[str]) -> list[float] | None:
    try:
        numbers = [float(text) for text in texts]
    except ValueError:
        return None
    # "nan" and "inf" have no place among quartiles.
    return numbers if all(map(math.isfinite, numbers)) else None
