"""Reading the JSON files the project writes beside its artifacts."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from detr.problems import problem_line

M = TypeVar("M", bound=BaseModel)


class SidecarError(ValueError):
    """A file that is not what it should be; the message is one line naming file and place."""


def read_sidecar(path: Path, kind: type[M]) -> M:
    """Reads and validates a JSON file.

    Raises:
        SidecarError: The file is missing, unreadable, no JSON, or has a key or a value that
            ``kind`` does not; the caller knows what that means to its user.
    """
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise SidecarError(f"{path}: {error.strerror or error}") from error
    except ValidationError as error:
        raise SidecarError(f"{path}: {problem_line(error, kind)}") from error
