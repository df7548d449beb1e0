"""The report as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from bench.report.grid import grid
from bench.report.model import Report, ReportRow, percent
from detr.metrics.slices import Slice


def render_markdown(report: Report) -> str:
    """Verdict, results, per-class tables, environment and commands."""
    parts = [
        f"# {report.title}",
        "\n".join(f"- **{sentence}**" for sentence in report.verdict()),
        *_budget(report),
        *(f"{note}." for note in report.notes()),
        *(f"Latency: {caveat}." for caveat in report.caveats()),
        f"{report.rows[0].coco.images} images of `{report.data}`, {report.created}. "
        "AP is COCO's, times 100. Latency is the median, end to end: decoded image in memory to "
        "detections in memory.",
        *_grid(report),
        _results(report),
        *_at_ious(report),
        *_masks(report),
        "## AP per class",
        _per_class(report),
    ]
    if report.kitti_classes():
        parts += [
            "## KITTI AP, 40 recall points (11 in brackets)",
            _kitti(report),
            *_kitti_note(report),
        ]
    parts += _slices(report)
    parts += ["## Environment", _environment(report), "## How to repeat"]
    parts.append("```\n" + "\n".join(report.commands) + "\n```")
    return "\n\n".join(parts) + "\n"


def _grid(report: Report) -> list[str]:
    if not report.grid:
        return []
    cells = grid(report.rows)
    rows = [
        [
            name,
            *(
                ", ".join(
                    (f"{row.model}: " if len(cells.cells[name, one]) > 1 else "")
                    + f"{row.ms:.2f} ms (×{cells.base.ms / row.ms:.2f}), {percent(row.coco.ap)} AP"
                    for row in cells.cells[name, one]
                )
                or "–"
                for one in cells.series
            ),
        ]
        for name in cells.depths
    ]
    head = ["layers", *(f"{engine} {precision}" for precision, engine in cells.series)]
    lines = [table(head, rows), f"× is the speed relative to {cells.base.name}."]
    return lines + [f"Not measured: {reason}" for reason in report.skipped]


def _budget(report: Report) -> list[str]:
    if report.budget is None:
        return []
    missed = report.told_misses()
    return ["Budget missed: " + "; ".join(missed) if missed else "Budget held by every artifact."]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, the first column left, the others right aligned."""
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _at_ious(report: Report) -> list[str]:
    """AP at the overlaps that were asked for."""
    ious = list(report.rows[0].coco.at_iou or {})
    if not ious:
        return []
    rows = []
    for row in report.rows:
        found = row.coco.at_iou or {}
        rows.append([row.name, *(percent(found.get(iou)) for iou in ious)])
    return [table(["AP at IoU", *ious], rows)]


def _masks(report: Report) -> list[str]:
    """AP of masks, where somebody finds some."""
    rows = [
        [
            row.name,
            *map(percent, (ap.ap, ap.ap50, ap.ap75, ap.ap_small, ap.ap_medium, ap.ap_large, ap.ar)),
            percent(row.coco.ap),
            "–" if row.latency.masks is None else f"{row.latency.masks.p50_ms:.1f}",
        ]
        for row in report.rows if (ap := row.masks) is not None
    ]  # fmt: skip
    head = ["masks", "AP", "AP50", "AP75", "AP S", "AP M", "AP L", "AR", "AP of boxes"]
    return [table([*head, "enlarging them, p50 ms"], rows)] if rows else []


def _results(report: Report) -> str:
    head = [
        "",
        "engine",
        "precision",
        "weights, M",
        "MB",
        "AP",
        "AP50",
        "AP75",
        "AP S",
        "AP M",
        "AP L",
        "AR",
    ]
    head += ["p50 ms", "p90 ms", "p99 ms", "engine only p50 ms", "images/s"]
    return table(head, [_result(row) for row in report.rows])


def _result(row: ReportRow) -> list[str]:
    ap, total = row.coco, row.latency.end_to_end
    aps = (ap.ap, ap.ap50, ap.ap75, ap.ap_small, ap.ap_medium, ap.ap_large, ap.ar)
    times = (total.p50_ms, total.p90_ms, total.p99_ms, row.latency.engine.p50_ms)
    return [
        *(row.name, row.engine, row.precision),
        "–" if row.parameters is None else f"{row.parameters / 1e6:.2f}",
        f"{row.size_mb:.1f}",
        *map(percent, aps),
        *(f"{ms:.1f}" for ms in times),
        f"{total.images_per_second:.1f}",
    ]


def _slices(report: Report) -> list[str]:
    rows = [(row.name, row.analysis) for row in report.rows if row.analysis is not None]
    if not rows:
        return []
    first = rows[0][1]
    parts = [
        f"## Slices: AP, and recall in % at score {first.score:g} and IoU {first.iou:g} with its "
        "95 % interval"
    ]
    for k, one in enumerate(first.slices):
        lines = []
        for i, value in enumerate(one.rows):
            cells = [analysis.slices[k].rows[i] for _, analysis in rows]
            told = [f"{percent(cell.ap)}, {_recall(cell)}" for cell in cells]
            lines.append([value.value, str(value.objects), *told])
        parts.append(table([one.by, "objects", *(name for name, _ in rows)], lines))
    return parts


def _recall(cell: Slice) -> str:
    if cell.interval is None:
        return "–"
    low, high = map(percent, cell.interval)
    return f"{percent(cell.recall)} ({low} – {high})"


def _per_class(report: Report) -> str:
    first = report.rows[0].coco.per_class
    return table(
        ["class", "boxes", *(row.name for row in report.rows)],
        [
            [n, str(first[n].count), *(percent(row.coco.per_class[n].ap) for row in report.rows)]
            for n in report.class_names()
        ],
    )


def _kitti(report: Report) -> str:
    rows = []
    for name in report.kitti_classes():
        for row in report.rows:
            if row.kitti is None:
                continue
            ap = row.kitti.per_class[name]
            levels = (ap.easy, ap.moderate, ap.hard)
            rows.append(
                [f"{name}, {row.name}"]
                + [f"{percent(level.ap40)} ({percent(level.ap11)}){level.mark}" for level in levels]
            )
    return table(["", "easy", "moderate", "hard"], rows)


def _kitti_note(report: Report) -> list[str]:
    notes = dict.fromkeys(row.kitti.note() for row in report.rows if row.kitti)
    return [note for note in notes if note]


def _environment(report: Report) -> str:
    lines = []
    for row in report.rows:
        environment = row.environment
        reasons = f" ({'; '.join(environment.reasons)})" if environment.reasons else ""
        gpu = environment.after.accelerator
        device = f"; {gpu.name}, driver {gpu.driver}, {gpu.power_mode}" if gpu else ""
        alone = row.latency.device
        if alone is not None:
            device += f", {alone.p50_ms:.2f} ms on its own clock, copies not counted"
        lines.append(f"- {row.name}: {environment.run}{reasons}{device}; sha256 `{row.sha256}`")
    machine = report.rows[0].environment.machine
    packages = ", ".join(f"{name} {version}" for name, version in machine.packages.items())
    lines.append(
        f"- {machine.cpu}, {machine.cores_usable} of {machine.cores} cores usable, "
        f"{machine.memory_gb} GiB; {machine.os}; Python {machine.python}, {packages}"
    )
    latency = report.rows[0].latency
    lines.append(
        f"- {latency.warmup} warm-up and {latency.count} timed calls of batch {latency.batch} "
        f"over {latency.images} images in turn"
    )
    return "\n".join(lines)
