"""A report as files: JSON, Markdown, CSV and a page."""

from __future__ import annotations

from pathlib import Path

from bench.report.html import render_html
from bench.report.markdown import render_markdown
from bench.report.model import Report
from detr.files import write_atomic
from detr.metrics.outcomes import MATCHES


def write_report(report: Report, folder: Path) -> list[Path]:
    """Writes ``report.json``, ``.md``, ``.csv`` and ``.html``; returns their paths.

    Beside them go ``slices.csv``, where there are slices, and ``matches.npz``, which ``bench
    compare`` reads.

    Raises:
        UserError: The folder is not writable or the disk is full.
    """
    contents = {
        "json": report.to_json(),
        "md": render_markdown(report),
        "csv": report.to_csv(),
        "html": render_html(report),
    }
    for suffix, text in contents.items():
        write_atomic(folder / f"report.{suffix}", text)
    if any(row.analysis for row in report.rows):
        write_atomic(folder / "slices.csv", report.slices_csv())
    if report.matches is not None:
        write_atomic(folder / MATCHES, report.matches)
    return [folder / f"report.{suffix}" for suffix in contents]
