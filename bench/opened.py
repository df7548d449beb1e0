"""Models that are open and about to be measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.artifact import provenance
from detr.config import ClassMap
from detr.errors import UserError
from detr.types import Detections
from engines.base import Engine
from engines.open import open_engine


@dataclass
class Artifact:
    """One model being measured, and what it found."""

    name: str
    path: Path
    engine: Engine
    precision: str
    checkpoint_sha256: str
    threads: int | None
    detections: list[Detections]

    @property
    def most(self) -> int:
        """Objects it can find in an image: a query finds one."""
        return self.engine.info.most_objects


def open_artifact(
    name: str, path: Path, engine: str | None, threads: int | None = None
) -> Artifact:
    """Loads a model into a runtime, nothing found yet.

    Raises:
        UserError: What :func:`engines.open.open_engine` raises.
    """
    opened = open_engine(path, engine, threads)
    return Artifact(name, path, opened, *provenance(path, opened.artifact), threads, [])


def model_names(models: Sequence[Path]) -> list[str]:
    """A short name for each model, as much of its path as tells it from the others.

    One that is given twice, to see how steady the machine is, gets a number behind it.
    """
    given = [model.resolve() for model in models]
    # A run directory's weights are called model.safetensors: its name says nothing.
    given = [path.parent if path.stem == "model" else path for path in given]
    paths = list(dict.fromkeys(given))
    names = dict(zip(paths, _short_names(paths), strict=True))
    repeats = [given[: k + 1].count(path) for k, path in enumerate(given)]
    return [
        names[path] if repeat == 1 else f"{names[path]} ({repeat})"
        for path, repeat in zip(given, repeats, strict=True)
    ]


def _short_names(paths: Sequence[Path]) -> list[str]:
    stems = [path.stem for path in paths]
    if len(set(stems)) == len(stems):
        return stems
    depth = 1
    while True:
        names = ["/".join(path.parts[1:][-depth:]) for path in paths]
        if len(set(names)) == len(names) or depth >= max(len(path.parts) for path in paths):
            return names
        depth += 1


def same_classes(path: Path, classes: ClassMap, other: Artifact) -> None:
    """Refuses a model whose classes are not those of the model at ``path``.

    Raises:
        UserError: ``bench-classes``.
    """
    if other.engine.info.classes != classes:
        raise UserError(
            "bench-classes",
            f"{other.path} has the classes {', '.join(other.engine.info.classes.names)}, but "
            f"{path} has {', '.join(classes.names)}: a report compares models of the same classes",
        )
