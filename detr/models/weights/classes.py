"""Names for the classes of published weights."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from detr.config import ClassMap
from detr.errors import UserError


def class_map(names: tuple[str, ...]) -> ClassMap:
    """Class map of published names, whose index is their category id as it is for COCO."""
    taken: dict[str, int] = {}
    unique = []
    for index, name in enumerate(names):
        # COCO's ids have holes, all published under one filler name.
        unique.append(f"{name}-{index}" if name in taken else name)
        taken[name] = index
    return ClassMap(names=tuple(unique), category_ids=tuple(range(len(names))))


def read_classes(path: Path, count: int) -> ClassMap:
    """Class map of a file for a model of ``count`` classes.

    Args:
        path: JSON with ``names`` and ``category_ids``, or a COCO annotation file. With ``count``
            entries they are in order; with fewer, each stands at the index of its category id, as
            in models trained on COCO's 91 ids.
        count: Classes the model predicts.

    Raises:
        UserError: ``weights-classes`` for a file of another form or that does not fit the model.
    """
    return fit_classes(read_class_list(path), count, str(path))


def fit_classes(found: ClassMap, count: int, place: str) -> ClassMap:
    """Class map for a model of ``count`` classes; see :func:`read_classes`.

    Raises:
        UserError: ``weights-classes`` where it does not fit the model.
    """
    if len(found) == count:
        return found
    if len(found) > count or max(found.category_ids, default=0) >= count:
        raise UserError(
            "weights-classes",
            f"{place}: {len(found)} classes with ids up to {max(found.category_ids, default=0)}, "
            f"but the model predicts {count}",
        )
    by_id = dict(zip(found.category_ids, found.names, strict=True))
    return ClassMap(
        names=tuple(by_id.get(i, f"unused-{i}") for i in range(count)),
        category_ids=tuple(range(count)),
    )


def read_class_list(path: Path) -> ClassMap:
    """Class map of a file, in its order.

    Args:
        path: JSON with ``names`` and ``category_ids``, or a COCO annotation file.

    Raises:
        UserError: ``weights-classes`` for a file of another form.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if "categories" in document:
            rows = sorted((int(c["id"]), str(c["name"])) for c in document["categories"])
            found = ClassMap(
                names=tuple(name for _, name in rows), category_ids=tuple(i for i, _ in rows)
            )
        else:
            found = ClassMap.model_validate(document)
    except OSError as error:
        raise UserError("weights-classes", f"{path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise UserError(
            "weights-classes",
            f"{path}: expected JSON with names and category_ids, or a COCO annotation file",
        ) from error
    if len(found.names) != len(found.category_ids):
        raise UserError("weights-classes", f"{path}: as many names as category_ids are needed")
    return found
