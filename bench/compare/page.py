"""A comparison as a Markdown text and as one HTML page that needs no other file."""

from __future__ import annotations

from pathlib import Path

from markupsafe import Markup

from bench.compare.model import Entry, ReportComparison
from bench.report.html import load_template, palette
from bench.report.markdown import table
from bench.report.model import percent
from detr.files import write_atomic
from detr.plot import Point, ap_over_latency


def comparison_html(comparison: ReportComparison) -> str:
    """Fills the template; every text from outside is escaped by it."""
    colors = palette(entry.name for entry in comparison.entries)
    # Escapes its own labels.
    plots = {
        machine: Markup(
            ap_over_latency(
                [_point(e, colors[e.name]) for e in comparison.entries if e.machine == machine],
                title_id=f"plot-{machine}",
            )
        )
        for machine in comparison.machines
    }
    return load_template(Path(__file__).with_name("compare.html.j2")).render(
        comparison=comparison, colors=colors, plots=plots
    )


def _point(entry: Entry, color: str) -> Point:
    return Point(
        name=entry.name, ms=entry.ms, low_ms=entry.ms_low, high_ms=entry.ms_high, ap=entry.ap,
        color=color, pareto=entry.pareto,
    )  # fmt: skip


def comparison_markdown(comparison: ReportComparison) -> str:
    """Entries, differences, machines and what cannot be claimed."""
    head = ["", "engine", "precision", "layers", "machine", "AP", "p50 ms", "p90 ms", "engine ms"]
    head += ["runs", "trainings", "certified"]
    rows = [
        [
            f"**{e.name}**" if e.pareto else e.name,
            *(e.engine, e.precision, _depth(e), e.machine),
            f"{percent(e.ap)}{_range(e)}",
            *(f"{ms:.2f}" for ms in (e.ms, e.p90_ms, e.engine_ms)),
            *(str(n) for n in (e.runs, e.trainings, e.clean)),
        ]
        for e in comparison.entries
    ]
    parts = [
        "# Comparison",
        f"{comparison.images} images and {comparison.boxes} boxes of `{comparison.data}`, "
        f"{comparison.created}. Bold: on its machine's Pareto front of AP over median end-to-end "
        "latency.",
        table(head, rows),
        "## Differences",
        "\n".join(f"- {d.sentence()}" for d in comparison.differences) or "Nothing to test.",
        "## Machines",
        "\n".join(f"- {letter}: {text}" for letter, text in comparison.machines.items()),
    ]
    if comparison.notes:
        parts += ["## Not claimed", "\n".join(f"- {note}" for note in comparison.notes)]
    parts += ["## Sources", "\n".join(f"- `{source}`" for source in comparison.sources)]
    return "\n\n".join(parts) + "\n"


def _depth(entry: Entry) -> str:
    """Encoder and decoder layers, as papers write them."""
    if entry.encoder_layers is None:
        return "–"
    return f"{entry.encoder_layers}/{entry.decoder_layers}"


def _range(entry: Entry) -> str:
    if entry.trainings < 2:
        return ""
    return f" ({percent(entry.ap_low)} to {percent(entry.ap_high)})"


def write_comparison(comparison: ReportComparison, folder: Path) -> list[Path]:
    """Writes ``compare.json``, ``.md`` and ``.html``; returns their paths.

    Raises:
        UserError: The folder is not writable or the disk is full.
    """
    contents = {
        "json": comparison.model_dump_json(indent=2) + "\n",
        "md": comparison_markdown(comparison),
        "html": comparison_html(comparison),
    }
    for suffix, text in contents.items():
        write_atomic(folder / f"compare.{suffix}", text)
    return [folder / f"compare.{suffix}" for suffix in contents]
