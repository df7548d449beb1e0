"""Reading label files, whose values are taken for what they are and never guessed at.

In JSON ``"0"`` is text and no number, ``1.7`` no whole one, ``true`` no 1; ``2.0`` is the whole
number 2.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detr.errors import UserError
from detr.files import TEXT
from detr.types import ImageId, is_image_id

_MISSING = object()
# Beyond it JSON programs do not agree on whole numbers (RFC 8259, section 6).
_LARGEST = 2**53


class FieldError(ValueError):
    """A field that is missing or not what it should be, in a few words."""


def read_lines(path: Path) -> list[str]:
    """The lines of a label file.

    Raises:
        UserError: ``label-missing`` or ``label-unreadable``.
    """
    try:
        return path.read_text(encoding=TEXT).splitlines()
    except FileNotFoundError as error:
        raise UserError("label-missing", f"{path}: no such label file") from error
    except UnicodeDecodeError as error:
        raise UserError("label-unreadable", f"{path}: not a text file") from error
    except OSError as error:
        raise UserError("label-unreadable", f"{path}: {error.strerror or error}") from error


def read_json(path: Path, code: str) -> Any:
    """The content of an annotation file.

    Raises:
        UserError: ``data-missing``, or ``code`` where it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding=TEXT))
    except OSError as error:
        raise UserError("data-missing", f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(code, f"{path}: {error}") from error


def parse_number(word: str) -> float:
    """A number written in a row of text; NaN where it is none, or infinite."""
    try:
        value = float(word)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def shown(value: object) -> str:
    """A JSON value as its file has it, shortened."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else f"{text[:37]}..."


def whole(row: Mapping[str, Any], key: str, least: int | None = None, most: int = _LARGEST) -> int:
    """A whole number."""
    value = row.get(key, _MISSING)
    if not _is_number(value) or not math.isfinite(value) or value != int(value):
        raise _wrong(key, value, "a whole number")
    if least is not None and value < least:
        raise FieldError(f"{key} is {shown(value)}, less than {least}")
    return _bounded(int(value), key, most)


def number(row: Mapping[str, Any], key: str) -> float:
    """A finite number."""
    value = row.get(key, _MISSING)
    if not _is_number(value):
        raise _wrong(key, value, "a number")
    if not math.isfinite(value):
        raise FieldError(f"{key} is not finite")
    return float(value)


def numbers(row: Mapping[str, Any], key: str, names: Sequence[str]) -> list[float]:
    """A list of finite numbers, one for each name."""
    value = row.get(key, _MISSING)
    if not isinstance(value, list) or len(value) != len(names):
        raise _wrong(key, value, f"[{', '.join(names)}]")
    if not all(map(_is_number, value)):
        raise _wrong(key, value, f"[{', '.join(names)}] in numbers")
    if not all(map(math.isfinite, value)):
        raise FieldError(f"{key} {shown(value)} is not finite")
    return [float(v) for v in value]


def text(row: Mapping[str, Any], key: str) -> str:
    """Text that is not empty."""
    value = row.get(key, _MISSING)
    if not isinstance(value, str) or not value:
        raise _wrong(key, value, "text")
    return value


def flag(row: Mapping[str, Any], key: str) -> bool:
    """A switch, off where it is missing: true or false, 1 or 0."""
    value = row.get(key, False)
    if isinstance(value, str) or value not in (0, 1):
        raise _wrong(key, value, "0 or 1")
    return bool(value)


def image_id(row: Mapping[str, Any], key: str) -> ImageId:
    """A whole number or text."""
    value = row.get(key, _MISSING)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not is_image_id(value):
        raise _wrong(key, value, "a whole number or text")
    return value if isinstance(value, str) else _bounded(value, key, _LARGEST)


def _bounded(value: int, key: str, most: int) -> int:
    if abs(value) > most:
        raise FieldError(f"{key} is {shown(value)}, too large")
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _wrong(key: str, value: object, wanted: str) -> FieldError:
    if value is _MISSING:
        return FieldError(f"{key} is missing")
    return FieldError(f"{key} is {shown(value)}, not {wanted}")
