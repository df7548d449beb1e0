"""The data formats there are: ours, and those of other packages.

Another package offers one as an entry point of the group ``detr_distillery.formats``, whose name is
the format's and which leads to a :class:`~detr.data.formats.base.DataFormat`.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any

from detr.data.formats.base import DataFormat
from detr.data.formats.bdd100k import BDD100K
from detr.data.formats.coco import COCO
from detr.data.formats.kitti import KITTI
from detr.data.formats.voc import VOC
from detr.data.formats.yolo import YOLO
from detr.errors import UserError

GROUP = "detr_distillery.formats"
OURS: tuple[DataFormat[Any], ...] = (KITTI, COCO, YOLO, VOC, BDD100K)


def format_names() -> list[str]:
    """Ours first."""
    ours = [form.name for form in OURS]
    return ours + sorted({point.name for point in entry_points(group=GROUP)} - {*ours})


def find_format(name: str) -> DataFormat[Any] | None:
    """The format of a name; another package's is imported when it is asked for.

    Raises:
        UserError: ``data-format`` where another package's cannot be imported, is none, or goes by
            the name of another.
    """
    ours = next((form for form in OURS if form.name == name), None)
    theirs = list(entry_points(group=GROUP, name=name))
    if theirs and (ours is not None or len(theirs) > 1):
        raise UserError(
            "data-format",
            f"data format {name!r} is offered by {' and '.join(map(_package, theirs))}"
            f"{' and is one of ours' if ours is not None else ''}: uninstall all but one",
        )
    return _load(theirs[0]) if theirs else ours


def _load(point: EntryPoint) -> DataFormat[Any]:
    where = f"data format {point.name!r} of {_package(point)}"
    try:
        form = point.load()
    except Exception as error:  # whatever the other package's import raises
        raise UserError(
            "data-format", f"{where}: {point.value}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(form, DataFormat) or form.name != point.name:
        raise UserError(
            "data-format", f"{where}: {point.value} is no DataFormat called {point.name!r}"
        )
    return form


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value
