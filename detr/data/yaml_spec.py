"""The data YAML: a folder, a split and what becomes of its class names."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import yaml
from pydantic import ValidationError

from detr.config import Strict
from detr.errors import UserError
from detr.problems import problem_line


class DataSpec(Strict):
    """A data set and its class policy.

    Attributes:
        format: Folder layout.
        path: Folder, relative to the YAML file's.
        split: As in ``kitti:PATH:split``.
        classes: Class name to the source names merged into it; None keeps the format's classes.
        ignore: Source names that become ignore regions; ``*`` for all that are in no class.
    """

    format: Literal["kitti", "coco"]
    path: Path
    split: str | None = None
    classes: dict[str, list[str]] | None = None
    ignore: tuple[str, ...] = ()


def read_data_spec(path: Path) -> DataSpec:
    """Reads a data YAML; its ``path`` becomes absolute or relative to the working folder.

    Raises:
        UserError: ``data-missing`` or ``data-yaml``, naming file and key.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            keys = ", ".join(DataSpec.model_fields)
            raise UserError("data-yaml", f"{path}: not a YAML mapping; its keys are {keys}")
        spec = DataSpec.model_validate(content)
    except OSError as error:
        raise UserError("data-missing", f"{path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError("data-yaml", f"{path}: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        raise UserError("data-yaml", f"{path}: {problem_line(error, DataSpec)}") from error
    if spec.classes is not None and not spec.classes:
        raise UserError("data-yaml", f"{path}: classes: is empty")
    return spec.model_copy(update={"path": path.parent / spec.path.expanduser()})
