"""Opening a data set by what the user typed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from detr.config import ClassMap
from detr.data.dataset import Dataset
from detr.data.formats.base import DataFormat
from detr.data.formats.registry import find_format, format_names
from detr.data.spec import DataSpec, read_yaml
from detr.errors import UserError
from detr.problems import problem_line


def open_dataset(spec: str, classes: ClassMap | None = None) -> Dataset:
    """Opens ``FORMAT:PATH[:SPLIT]`` (``kitti:``, ``coco:``, ...) or a YAML file.

    Without a split, KITTI gives every frame, and COCO the only annotation file there is.

    Args:
        spec: What the user typed.
        classes: Class indices to use, usually a model's: the set's names are mapped onto it by
            name. None gives the set's own.

    Raises:
        UserError: ``data-spec``, ``data-missing``, ``split-missing``, ``data-yaml``,
            ``data-format``, ``coco-json``. A class name that is not in ``classes`` is
            ``class-not-in-map`` when the labels that hold it are read.
    """
    name, colon, rest = spec.partition(":")
    form = find_format(name) if colon and rest else None
    if form is not None:
        path, split = _split_of(rest)
        source = _validated(form, {"format": name, "path": path, "split": split}, spec)
    elif spec.endswith((".yaml", ".yml")):
        form, source = _read_spec(Path(spec).expanduser())
    else:
        raise UserError(
            "data-spec",
            f"{spec!r}: expected FORMAT:PATH[:SPLIT] or a .yaml file; formats are "
            f"{', '.join(format_names())}",
        )
    return form.open(source, classes, spec)


def _read_spec(path: Path) -> tuple[DataFormat[Any], DataSpec]:
    """The format and the keys of a data YAML; its ``path`` counts from the YAML's folder."""
    content = read_yaml(path)
    name = content.get("format")
    form = find_format(name) if isinstance(name, str) else None
    if form is None:
        given = f"{name!r} is none of" if "format" in content else "is missing; it is one of"
        raise UserError("data-yaml", f"{path}: format {given} {', '.join(format_names())}")
    source = _validated(form, content, str(path))
    if source.classes is not None and not source.classes:
        raise UserError("data-yaml", f"{path}: classes: is empty")
    return form, source.model_copy(update={"path": path.parent / source.path.expanduser()})


def _validated(form: DataFormat[Any], content: dict[str, Any], where: str) -> DataSpec:
    try:
        source: DataSpec = form.spec.model_validate(content)
    except ValidationError as error:
        raise UserError("data-yaml", f"{where}: {problem_line(error, form.spec)}") from error
    return source


def _split_of(rest: str) -> tuple[Path, str | None]:
    """Path and split; a path that exists may hold colons itself."""
    whole = Path(rest).expanduser()
    head, colon, split = rest.rpartition(":")
    if whole.exists() or not colon or not head or "/" in split:
        return whole, None
    return Path(head).expanduser(), split
