"""An analysis of several artifacts as a page shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from bench.analysis.model import Analysis
from bench.report.curves import precision_over_recall
from detr.metrics.slices import Slice

# Beyond these, tables and plots say less than they cost: the figures are in report.json.
_MOST_CLASSES, _MOST_ARTIFACTS = 12, 6
# Class names of a matrix are cut to this many letters.
_NAME = 14


@dataclass(frozen=True)
class SliceRow:
    """One value of a property: objects to find, and the slice of each artifact."""

    value: str
    objects: int
    cells: list[Slice]


@dataclass(frozen=True)
class SliceTable:
    """One property."""

    by: str
    of: str
    rows: list[SliceRow]


@dataclass(frozen=True)
class Matrix:
    """A confusion matrix with a shade from 0 to 1 for each cell, by its share of the row."""

    heads: list[str]
    rows: list[tuple[str, list[tuple[int, float, bool]]]]


@dataclass(frozen=True)
class Shown:
    """What a page needs of the analyses.

    Attributes:
        score, iou: From which on detections count.
        plot: Precision over recall, mean of the classes.
        small: The same of every class, where they are few.
        tables: Slices.
        matrices: By artifact, where the classes are few.
        confused: By artifact: most frequent mistakes in words.
        left_out: Artifacts beyond those a page has room for.
    """

    score: float
    iou: float
    plot: Markup
    small: list[Markup]
    tables: list[SliceTable]
    matrices: dict[str, Matrix]
    confused: dict[str, list[str]]
    left_out: int


def shown(analyses: Mapping[str, Analysis], colors: Mapping[str, str]) -> Shown | None:
    """Prepares the analyses of a report's first artifacts; ``None`` where there is none."""
    some = dict(list(analyses.items())[:_MOST_ARTIFACTS])
    if not some:
        return None
    first = next(iter(some.values()))
    names = [name for name in first.curves if name != "all"]

    def plot(key: str, title: str, small: bool) -> Markup:
        curves = {name: one.curves[key] for name, one in some.items() if key in one.curves}
        return Markup(precision_over_recall(curves, colors, title, small))  # escapes its labels

    few = len(first.confusion.names) <= _MOST_CLASSES
    return Shown(
        score=first.score,
        iou=first.iou,
        plot=plot("all", f"mean of the classes, IoU {first.iou:g}", False),
        small=[plot(name, name, True) for name in names] if 1 < len(names) <= _MOST_CLASSES else [],
        tables=_tables(list(some.values())),
        matrices={name: _matrix(one) for name, one in some.items()} if few else {},
        confused={name: one.confused()[:8] for name, one in some.items()},
        left_out=len(analyses) - len(some),
    )


def _tables(analyses: Sequence[Analysis]) -> list[SliceTable]:
    """Many classes have a table of their own on the page already."""
    tables = []
    for k, one in enumerate(analyses[0].slices):
        if one.by == "class" and len(one.rows) > _MOST_CLASSES:
            continue
        rows = [
            SliceRow(row.value, row.objects, [other.slices[k].rows[i] for other in analyses])
            for i, row in enumerate(one.rows)
        ]
        tables.append(SliceTable(one.by, one.of, rows))
    return tables


def _matrix(analysis: Analysis) -> Matrix:
    names = [_short(name) for name in analysis.confusion.names]
    used = [
        k for k, row in enumerate(analysis.confusion.counts[:-1])
        if any(row) or any(other[k] for other in analysis.confusion.counts)
    ]  # fmt: skip
    nothing = len(names)
    places = [*used, nothing]
    rows = []
    for k in places:
        counts = [analysis.confusion.counts[k][c] for c in places]
        # False alarms have no objects to be a share of.
        whole = sum(counts) or 1
        rows.append(
            (
                "nothing" if k == nothing else names[k],
                [(n, n / whole, c == k) for c, n in zip(places, counts, strict=True)],
            )
        )
    return Matrix([*(names[k] for k in used), "missed"], rows)


def _short(name: str) -> str:
    return name if len(name) <= _NAME else name[: _NAME - 1] + "…"
