"""What a user says of a data set: format, folder, split and what becomes of its class names."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from detr.config import ClassMap, Strict, Word
from detr.data.images import Exif
from detr.data.policy import ClassPolicy, merge_map
from detr.data.value_range import Percentiles, ValueRange
from detr.errors import UserError
from detr.yaml_loader import Loader


class DataSpec(Strict):
    """A data set and its class policy; a format with further keys extends it.

    Attributes:
        format: Name of the format.
        path: Folder, relative to the YAML file's.
        split: As in ``kitti:PATH:split``.
        classes: Class name to the source names merged into it; None keeps the format's classes.
        ignore: Source names that become ignore regions; ``*`` for all that are in no class.
        exif: Which raster the labels mean where EXIF data turn an image: ``apply`` for the upright
            one, ``ignore`` for the one as stored. Asked for where the labels do not tell.
        range: Values of pictures of more than 8 bits that become black and white, ``[LOW, HIGH]``
            or ``percentiles: [LOW, HIGH]`` of all values.
        only: List of the images to use, one name a line, relative to the YAML file's folder.
        drop: Codes of errors whose annotation (or, for ``image-missing`` and ``image-twice``,
            image) is left out instead of stopping.
    """

    format: str
    path: Path
    split: str | None = None
    classes: dict[Word, list[str]] | None = None
    ignore: tuple[str, ...] = ()
    exif: Exif | None = None
    range: ValueRange | Percentiles | None = None
    only: Path | None = None
    drop: frozenset[str] = frozenset()

    def policy(
        self,
        given: ClassMap | None,
        own: ClassMap,
        where: str,
        always: frozenset[str] = frozenset(),
    ) -> ClassPolicy:
        """The classes to use, and what becomes of each source name.

        Args:
            given: The classes of the model that looks at the data, which win; None asks for the
                YAML's, numbered from 1, or for ``own``.
            own: The classes the files have.
            where: Names the data set in messages.
            always: Source names that the format ignores unless they are merged into a class.

        Raises:
            UserError: ``data-yaml`` where a source belongs to two classes, or to one and to what is
                ignored.
        """
        merged = merge_map(self.classes or {}, where)
        wanted = {*merged, *(self.classes or {})}
        if both := [name for name in self.ignore if name in wanted]:
            raise UserError(
                "data-yaml", f"{where}: ignore: {both[0]!r} is asked for in classes as well"
            )
        if given is None and self.classes is not None:
            names = tuple(self.classes)
            given = ClassMap(names=names, category_ids=tuple(range(1, len(names) + 1)))
        return ClassPolicy(given or own, merged, frozenset(self.ignore) | (always - merged.keys()))


class PlacedSpec(DataSpec):
    """A data set laid out as its format does it, or with its two parts named.

    Attributes:
        path: Folder of the layout, or where ``images`` and ``annotations`` count from.
        images: Folder of the pictures.
        annotations: Annotation file, or folder of label files.
    """

    path: Path = Path()
    images: Path | None = None
    annotations: Path | None = None

    def placed(self, part: Path) -> Path:
        """One of the two as a path of its own."""
        return self.path / part.expanduser()


def read_yaml(path: Path, keys: Iterable[str]) -> dict[str, Any]:
    """The content of a YAML file with some of these keys.

    Raises:
        UserError: ``data-missing`` or ``data-yaml``.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise UserError("data-missing", f"{path}: {error.strerror or error}") from error
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError("data-yaml", f"{path}{line}: {error.problem or error.context}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError("data-yaml", f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError("data-yaml", f"{path}: not a YAML mapping; its keys are {', '.join(keys)}")
    return content
