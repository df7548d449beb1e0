"""Short names for files that lie in different folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """A name without suffix for each file, as much of its path as tells it from the others.

    ``left/1.png`` and ``right/1.png`` become ``left_1`` and ``right_1``; where that does not tell
    them apart (``1.png`` beside ``1.jpg``), the suffix is part of the name: ``1_png``.

    Args:
        paths: Different files.
    """
    deepest = max((len(path.parts) for path in paths), default=1)
    for whole in (False, True):
        for depth in range(1, deepest + 1):
            names = [_name(path, depth, whole) for path in paths]
            if len(set(names)) == len(names):
                return names
    return [f"{i:06d}" for i in range(len(paths))]


def _name(path: Path, depth: int, whole: bool) -> str:
    parts = [part for part in path.parts if part not in (path.anchor, "..")][-depth:]
    stem, suffix = path.stem, path.suffix.lstrip(".")
    return "_".join([*parts[:-1], f"{stem}_{suffix}" if whole and suffix else stem])
