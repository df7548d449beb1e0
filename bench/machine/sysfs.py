"""Reading the small files of sysfs, procfs and the device tree, any of which may not be there."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

# What stands in a reading for a value nobody could read.
Unreadable = Literal["unreadable"]


def read_text(path: Path) -> str | None:
    """Content without white space around it, ``None`` where it is empty or cannot be read."""
    try:
        # A device-tree string ends in a NUL.
        return path.read_text().rstrip("\0").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def read_number(path: Path) -> int | None:
    """A file that holds one natural number."""
    content = read_text(path)
    return int(content) if content is not None and content.isdigit() else None
