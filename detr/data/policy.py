"""From the names in label files to class indices: merging, ignoring, refusing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from detr.config import ClassMap
from detr.errors import UserError

IGNORE = -1
REST = "*"


@dataclass(frozen=True)
class ClassPolicy:
    """What becomes of each name in the label files.

    Attributes:
        classes: The classes of the data set or of the model that looks at it.
        merged: Source name to class name; a name that is not a key keeps its own.
        ignored: Source names that become ignore regions; ``*`` stands for all that are no class.
    """

    classes: ClassMap
    merged: Mapping[str, str]
    ignored: frozenset[str]

    def index(self, source: str, where: str) -> int:
        """Class index of a source name, or :data:`IGNORE`.

        Raises:
            UserError: ``class-not-in-map``, naming ``where``.
        """
        if source in self.ignored:
            return IGNORE
        name = self.merged.get(source, source)
        if name in self.classes.names:
            return self.classes.names.index(name)
        if REST in self.ignored:
            return IGNORE
        became = f" (merged into {name!r})" if name != source else ""
        raise UserError(
            "class-not-in-map",
            f"{where}: class {source!r}{became} is none of {', '.join(self.classes.names)}; "
            "merge or ignore it in a data YAML",
        )


def merge_map(classes: Mapping[str, list[str]], where: str) -> dict[str, str]:
    """Turns class to sources into source to class.

    Raises:
        UserError: ``data-yaml`` where a source belongs to two classes.
    """
    merged: dict[str, str] = {}
    for name, sources in classes.items():
        for source in sources:
            if merged.setdefault(source, name) != name:
                raise UserError(
                    "data-yaml",
                    f"{where}: classes: {source!r} is in both {merged[source]!r} and {name!r}",
                )
    return merged
