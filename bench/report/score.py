"""A score as files: JSON and a page."""

from __future__ import annotations

from pathlib import Path

from bench.report.analysis import shown
from bench.report.html import load_template, palette
from bench.score import Score
from detr.files import write_atomic


def write_score(score: Score, folder: Path) -> Path:
    """Writes ``score.json`` and ``score.html``; returns the page's path.

    Raises:
        UserError: The folder is not writable or the disk is full.
    """
    name = Path(score.detections).name
    colors = palette([name])
    page = load_template(Path(__file__).with_name("score.html.j2")).render(
        score=score,
        colors=colors,
        analysis=shown({} if score.analysis is None else {name: score.analysis}, colors),
        mistakes=score.mistakes,
    )
    write_atomic(folder / "score.json", score.model_dump_json(indent=2) + "\n")
    write_atomic(folder / "score.html", page)
    return folder / "score.html"
