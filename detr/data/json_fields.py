"""Values of JSON rows that people's programs wrote: taken for what they are, never guessed at.

``"0"`` is text and no number, ``1.7`` no whole one, ``true`` no 1; ``2.0`` is the whole number 2.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from detr.types import ImageId, is_image_id

_MISSING = object()


class FieldError(ValueError):
    """A field that is missing or not what it should be, in a few words."""


def shown(value: object) -> str:
    """A JSON value as its file has it, shortened."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else f"{text[:37]}..."


def whole(row: Mapping[str, Any], key: str, least: int | None = None) -> int:
    """A whole number."""
    value = row.get(key, _MISSING)
    if _is_number(value) and math.isfinite(value) and value == int(value):
        if least is None or value >= least:
            return int(value)
        raise FieldError(f"{key} is {shown(value)}, less than {least}")
    raise _wrong(key, value, "a whole number")


def number(row: Mapping[str, Any], key: str) -> float:
    """A finite number."""
    value = row.get(key, _MISSING)
    if not _is_number(value):
        raise _wrong(key, value, "a number")
    if not math.isfinite(value):
        raise FieldError(f"{key} is not finite")
    return float(value)


def numbers(row: Mapping[str, Any], key: str, names: str) -> list[float]:
    """A list of finite numbers, as many as there are words in ``names``."""
    value = row.get(key, _MISSING)
    wanted = f"[{', '.join(names.split())}]"
    if not isinstance(value, list) or len(value) != len(names.split()):
        raise _wrong(key, value, f"{wanted}")
    if not all(map(_is_number, value)):
        raise _wrong(key, value, f"{wanted} in numbers")
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
    if is_image_id(value):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    raise _wrong(key, value, "a whole number or text")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _wrong(key: str, value: object, wanted: str) -> FieldError:
    if value is _MISSING:
        return FieldError(f"{key} is missing")
    return FieldError(f"{key} is {shown(value)}, not {wanted}")
