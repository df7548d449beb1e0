"""Opening a data set by what the user typed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from detr.config import ClassMap
from detr.data.box_rules import left_out
from detr.data.dataset import Dataset
from detr.data.formats.base import DataFormat
from detr.data.formats.registry import find_format, format_names
from detr.data.spec import DataSpec, read_yaml
from detr.data.subset import Subset, listed
from detr.errors import UserError
from detr.problems import problem_line


def open_dataset(
    spec: str,
    classes: ClassMap | None = None,
    value_range: tuple[float, float] | None = None,
) -> Dataset:
    """Opens ``FORMAT:PATH[:SPLIT]`` (``kitti:``, ``coco:``, ...) or a YAML file.

    Without a split, KITTI gives every frame, and COCO the only annotation file there is.

    Args:
        spec: What the user typed.
        classes: Class indices to use, usually a model's: the set's names are mapped onto it by
            name. None gives the set's own.
        value_range: For pictures of more than 8 bits, usually a model's: used unless the YAML gives
            numbers of its own.

    Raises:
        UserError: ``data-spec``, ``data-missing``, ``split-missing``, ``data-yaml``,
            ``data-format``, ``coco-json``. A class name that is not in ``classes`` is
            ``class-not-in-map`` when the labels that hold it are read.
    """
    form, source = parse_spec(spec)
    if value_range is not None and not isinstance(source.range, tuple):
        source = source.model_copy(update={"range": value_range})
    dataset: Dataset = form.open(source, classes, spec)
    if source.only is not None:
        dataset = Subset(dataset, listed(dataset, source.only))
    return _without_missing(dataset) if "image-missing" in source.drop else dataset


def parse_spec(spec: str) -> tuple[DataFormat[Any], DataSpec]:
    """The format a user asked for, and everything else the user said.

    Raises:
        UserError: ``data-spec``, ``data-missing``, ``data-yaml`` or ``data-format``.
    """
    name, colon, rest = spec.partition(":")
    form = find_format(name) if colon and rest else None
    if form is not None:
        path, split = split_of(rest)
        return form, _validated(form, {"format": name, "path": path, "split": split}, spec)
    if spec.endswith((".yaml", ".yml")):
        return _read_spec(Path(spec).expanduser())
    raise UserError(
        "data-spec",
        f"{spec!r}: expected FORMAT:PATH[:SPLIT] or a .yaml file; formats are "
        f"{', '.join(format_names())}",
    )


def _without_missing(dataset: Dataset) -> Dataset:
    paths = [dataset.image_path(i) for i in range(len(dataset))]
    there = [path.exists() for path in paths]
    gone = [
        left_out(UserError("image-missing", f"{path}: no such image"))
        for path, found in zip(paths, there, strict=True)
        if not found
    ]
    return Subset(dataset, [i for i, found in enumerate(there) if found], gone) if gone else dataset


def _read_spec(path: Path) -> tuple[DataFormat[Any], DataSpec]:
    """The format and the keys of a data YAML; its ``path`` counts from the YAML's folder."""
    content = read_yaml(path, DataSpec.model_fields)
    name = content.get("format")
    form = find_format(name) if isinstance(name, str) else None
    if form is None:
        given = f"{name!r} is none of" if "format" in content else "is missing; it is one of"
        hint = f" (this looks like yolo:{path})" if {"names", "train"} <= content.keys() else ""
        raise UserError("data-yaml", f"{path}: format {given} {', '.join(format_names())}{hint}")
    source = _validated(form, content, str(path))
    if source.classes is not None and not source.classes:
        raise UserError("data-yaml", f"{path}: classes: is empty")
    paths = {"path": path.parent / source.path.expanduser()}
    if source.only is not None:
        paths["only"] = path.parent / source.only.expanduser()
    return form, source.model_copy(update=paths)


def _validated(form: DataFormat[Any], content: dict[str, Any], where: str) -> DataSpec:
    try:
        source: DataSpec = form.spec.model_validate(content)
    except ValidationError as error:
        raise UserError("data-yaml", f"{where}: {problem_line(error, form.spec)}") from error
    return source


def split_of(rest: str) -> tuple[Path, str | None]:
    """Path and split; a path that exists may hold colons itself."""
    whole = Path(rest).expanduser()
    head, colon, split = rest.rpartition(":")
    if whole.exists() or not colon or not head or "/" in split:
        return whole, None
    return Path(head).expanduser(), split
