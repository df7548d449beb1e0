"""Which of a model's classes are those of a data set, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ClassMatch:
    """Classes of a data set among those a model knows.

    Attributes:
        columns: The model's class of each class of the data; ``None`` where it has no such class.
        new: Names of the data that the model does not know, as the model would call them.
        lost: Renamed classes whose other name the model does not know.
        strange: Renamed classes that the data does not have.
    """

    columns: tuple[int | None, ...]
    new: tuple[str, ...]
    lost: tuple[str, ...]
    strange: tuple[str, ...]


def match_classes(
    wanted: Sequence[str], known: Sequence[str], renamed: Mapping[str, str]
) -> ClassMatch:
    """Finds classes by name.

    Args:
        wanted: The data's names.
        known: The model's names, in the order of its outputs.
        renamed: The model's names of those classes of the data that have another name there.
    """
    index = {name: i for i, name in reversed(list(enumerate(known)))}
    names = [renamed.get(name, name) for name in wanted]
    return ClassMatch(
        columns=tuple(index.get(name) for name in names),
        new=tuple(name for name in names if name not in index),
        lost=tuple(
            there for here, there in renamed.items() if here in wanted and there not in index
        ),
        strange=tuple(name for name in renamed if name not in wanted),
    )


def listed(names: Sequence[str], most: int = 6) -> str:
    """A few names and how many more."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
