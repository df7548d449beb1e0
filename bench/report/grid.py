"""A sweep as a table: depths down, precisions and engines across."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.report.model import ReportRow


@dataclass(frozen=True)
class Grid:
    """Rows of a report by what was varied.

    Attributes:
        depths: ``encoder/decoder`` layers, the deepest first.
        series: (precision, engine), in the order they appear.
        cells: The rows of each depth and series; usually one, empty where nothing was measured.
        base: What speed-ups are relative to: the first row of the deepest model.
    """

    depths: list[str]
    series: list[tuple[str, str]]
    cells: dict[tuple[str, tuple[str, str]], list[ReportRow]]
    base: ReportRow


def grid(rows: Sequence[ReportRow]) -> Grid:
    """Sorts rows into a table.

    Raises:
        ValueError: No row.
    """
    if not rows:
        raise ValueError("a table of no rows")
    layers = {depth(row): _layers(row) for row in rows}
    depths = sorted(layers, key=lambda name: layers[name], reverse=True)
    series = list(dict.fromkeys((row.precision, row.engine) for row in rows))
    cells: dict[tuple[str, tuple[str, str]], list[ReportRow]] = {
        (name, one): [] for name in depths for one in series
    }
    for row in rows:
        cells[depth(row), (row.precision, row.engine)].append(row)
    base = next(row for row in rows if depth(row) == depths[0])
    return Grid(depths, series, cells, base)


def depth(row: ReportRow) -> str:
    """Encoder and decoder layers, as papers write them."""
    if row.encoder_layers is None:
        return "–"
    return f"{row.encoder_layers}/{row.decoder_layers}"


def _layers(row: ReportRow) -> tuple[int, int]:
    return row.encoder_layers or 0, row.decoder_layers or 0
