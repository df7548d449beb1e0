"""``detr bench``: average precision and latency of artifacts."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from bench.fit.command import fit
from bench.op.msda import op
from bench.options import data_option, iterations_option, limit_option, models_argument
from bench.report.model import PerformanceBudget, Report
from bench.timing import TimingReport, benchmark_timing
from detr.cli_support import LazyGroup, Number, emit, json_option, threads_option
from detr.data import open_dataset
from detr.errors import GateError, UserError
from detr.files import output_folder, write_atomic
from detr.metrics.coco_ap import MAX_DETS, Accuracy
from engines.bundle import is_bundle
from engines.open import ENGINES

# By name: what a training step costs is known to the room above this one.
_ABOVE = {
    "train-step": (
        "distill.analysis.step_cost:command",
        "Split a training step into student, teacher, extra queries, matching and losses.",
    )
}


@click.group(cls=LazyGroup, lazy=_ABOVE, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Measure average precision and latency of the same artifact.

    Example: detr bench run student.bundle --data kitti:/data/kitti:val
    """


_max_dets = click.option(
    "--max-dets",
    type=click.IntRange(min=1),
    default=MAX_DETS,
    show_default=True,
    help="Detections of a class that count in an image.",
)
_ious = click.option(
    "--iou",
    "ious",
    multiple=True,
    type=Number(0, 1, min_open=True, max_open=True),
    help="Also tell AP at this overlap; may be repeated.",
)

_slices = click.option(
    "--slices",
    type=click.Path(path_type=Path, dir_okay=False),
    help="CSV file: a column image, perhaps a column object, and columns to slice by.",
)


@main.command()
@models_argument
@data_option
@click.option(
    "--engine",
    metavar="NAME",
    help=f"Runtime ({', '.join(ENGINES)}); the best at hand for each model by default.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder for report.json, .md, .csv and .html; only printed without it.",
)
@limit_option
@iterations_option
@click.option(
    "--rebuild",
    is_flag=True,
    help="First build the engine here and verify it on the golden images and DATA (export trt, "
    "export verify); needs --engine.",
)
@click.option(
    "--unlabeled",
    is_flag=True,
    help="Only time: DATA is a folder of images, or a data set whose labels are not read.",
)
@threads_option
@_max_dets
@_ious
@_slices
@click.option(
    "--budget-ms",
    type=Number(min=0, min_open=True),
    help="Most milliseconds end to end for nine images of ten (p90); missed: exit status 3.",
)
@click.option("--min-ap", type=Number(0, 1), help="Least COCO AP, 0 to 1; missed: exit status 3.")
@json_option
def run(
    models: tuple[Path, ...],
    data: str,
    engine: str | None,
    out: Path | None,
    limit: int | None,
    iterations: int,
    rebuild: bool,
    unlabeled: bool,
    threads: int | None,
    max_dets: int,
    ious: tuple[float, ...],
    slices: Path | None,
    budget_ms: float | None,
    min_ap: float | None,
    as_json: bool,
) -> None:
    """Measure AP and latency of each BUNDLE (or checkpoint).

    With a budget it serves in a pipeline: the report is written whatever comes out, and the exit
    status is 3 if a model misses the budget.

    Example: detr bench run teacher.bundle student.bundle --data kitti:/data/kitti:val --out report
    """
    from bench.run import benchmark

    arguments = ["detr", "bench", "run", *map(str, models), "--data", data]
    arguments += ["--rebuild"] if rebuild else []
    arguments += ["--unlabeled"] if unlabeled else []
    options = {
        "--engine": engine, "--out": out, "--limit": limit, "--iterations": iterations,
        "--threads": threads, "--max-dets": None if max_dets == MAX_DETS else max_dets,
        "--slices": slices, "--budget-ms": budget_ms, "--min-ap": min_ap,
    }  # fmt: skip
    for option, value in [*options.items(), *(("--iou", iou) for iou in ious)]:
        if value is not None:
            arguments += [option, str(value)]
    command = shlex.join(arguments)
    budget = None
    if budget_ms is not None or min_ap is not None:
        budget = PerformanceBudget(ms=budget_ms, min_ap=min_ap)
    _check_output(out)
    if unlabeled:
        asked = {"--rebuild": rebuild, "--min-ap": min_ap is not None, "--iou": bool(ious),
                 "--max-dets": max_dets != MAX_DETS, "--slices": slices is not None}  # fmt: skip
        if pointless := [option for option, given in asked.items() if given]:
            raise UserError("option-unlabeled", f"--unlabeled: without labels no {pointless[0]}")
        timing = benchmark_timing(models, data, engine, threads, limit, iterations, [command])
        _emit_timing(timing, out, budget_ms, as_json)
        return
    if rebuild:
        from bench.rebuild import rebuild as build

        build(models, engine, data)
    report = benchmark(
        models, data, engine, limit, iterations, [command], budget, threads=threads,
        accuracy=Accuracy(max_dets, ious), slices=slices,
    )  # fmt: skip
    if out is not None:
        from bench.report.write import write_report

        page = write_report(report, out)[-1]
        click.echo(f"wrote {page} (.json, .md, .csv beside it)", err=True)
    _tell(report, as_json)
    if missed := report.misses():
        raise GateError("bench-budget", "over the budget: " + "; ".join(missed))


def _emit_timing(
    report: TimingReport, out: Path | None, budget_ms: float | None, as_json: bool
) -> None:
    if out is not None:
        write_atomic(out / "timing.json", report.model_dump_json(indent=2) + "\n")
        click.echo(f"wrote {out / 'timing.json'}", err=True)
    emit(report, as_json, report.text())
    if missed := report.misses(budget_ms):
        raise GateError("bench-budget", "over the budget: " + "; ".join(missed))


@main.command()
@models_argument
@data_option
@click.option(
    "--engines",
    required=True,
    metavar="NAME,NAME",
    help=f"Runtimes, comma-separated: {', '.join(ENGINES)}.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder for report.json, .md, .csv and .html.",
)
@limit_option
@iterations_option
@threads_option
@_max_dets
@json_option
def sweep(
    models: tuple[Path, ...],
    data: str,
    engines: str,
    out: Path,
    limit: int | None,
    iterations: int,
    threads: int | None,
    max_dets: int,
    as_json: bool,
) -> None:
    """Measure depths, precisions and engines on one page.

    Every BUNDLE is measured in every engine. A bundle brings its depth and precision; make one
    for each with export onnx, for instance from students trained with 6/6, 3/6, 6/3 and 3/3
    layers, each --precision fp32 and fp16. An engine that is not installed or does not take a
    bundle leaves its place empty, with the reason.

    Example: detr bench sweep 66.bundle 33.bundle --engines native,openvino --data kitti:/k --out s
    """
    from bench.report.write import write_report
    from bench.sweep import sweep as run_sweep

    command = [*("detr", "bench", "sweep"), *map(str, models), "--data", data]
    command += ["--engines", engines, "--out", str(out), "--iterations", str(iterations)]
    command += [] if limit is None else ["--limit", str(limit)]
    command += [] if threads is None else ["--threads", str(threads)]
    command += [] if max_dets == MAX_DETS else ["--max-dets", str(max_dets)]
    names = [name.strip() for name in engines.split(",") if name.strip()]
    if not names:
        raise UserError("usage", "--engines names no runtime; see detr bench sweep --help")
    _check_output(out)
    report = run_sweep(
        models, names, data, limit, iterations, [shlex.join(command)], threads=threads,
        accuracy=Accuracy(max_dets),
    )  # fmt: skip
    click.echo(f"wrote {write_report(report, out)[-1]} (.json, .md, .csv beside it)", err=True)
    _tell(report, as_json)


@main.command()
@click.argument(
    "reports", metavar="REPORT...", nargs=-1, required=True, type=click.Path(path_type=Path)
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder for compare.json, .md and .html; only printed without it.",
)
@json_option
def compare(reports: tuple[Path, ...], out: Path | None, as_json: bool) -> None:
    """Compare reports of several runs, trainings and machines.

    A REPORT is a report.json or the folder it lies in. Rows of the same name, engine, precision,
    depth and machine are repeats. Shows the Pareto front of AP over latency and tests each entry
    against the teacher (or the best): latency over repeated runs (Welch), AP over repeated
    trainings (Welch) or else over images (paired bootstrap), and says what cannot be claimed.

    Example: detr bench compare monday/report.json tuesday orin/report.json --out comparison
    """
    from bench.compare.merge import compare_reports
    from bench.compare.page import write_comparison

    _check_output(out)
    comparison = compare_reports(reports)
    if out is not None:
        page = write_comparison(comparison, out)[-1]
        click.echo(f"wrote {page} (.json, .md beside it)", err=True)
    emit(comparison, as_json, comparison.text())


@main.command()
@click.argument("detections", type=click.Path(path_type=Path))
@data_option
@click.option(
    "--protocol",
    type=click.Choice(["coco", "kitti"]),
    help="By default kitti for KITTI result files of KITTI data, else coco.",
)
@_max_dets
@_ious
@click.option(
    "--boundary",
    is_flag=True,
    help="Also tell Boundary AP of masks; takes ten times as long as AP.",
)
@_slices
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder for score.json and score.html; only printed without it.",
)
@json_option
def score(
    detections: Path,
    data: str,
    protocol: str | None,
    max_dets: int,
    ious: tuple[float, ...],
    boundary: bool,
    slices: Path | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Score anyone's detections: AP from a file.

    DETECTIONS are a COCO results file or a folder of KITTI result files. Needs the labels only:
    no images, no model; where the images are there, the page shows the worst mistakes. Masks in a
    COCO results file are scored besides, if the labels have masks.

    Example: detr bench score results_folder --data kitti:/data/kitti:val --protocol kitti
    """
    from bench import score as scoring

    _check_output(out)
    result = scoring.score(
        detections, open_dataset(data), protocol, Accuracy(max_dets, ious), slices,  # type: ignore[arg-type]
        pictures=out is not None, boundary=boundary,
    )  # fmt: skip
    if out is not None:
        from bench.report.score import write_score

        click.echo(f"wrote {write_score(result, out)} (.json beside it)", err=True)
    emit(result, as_json, result.text())


def _check_output(out: Path | None) -> None:
    """Finds out before the measuring whether the report can be written."""
    if out is None:
        return
    if is_bundle(out):
        raise UserError("output-exists", f"{out}: is a bundle; choose another folder")
    output_folder(out)


def _tell(report: Report, as_json: bool) -> None:
    lines = [*report.verdict(), *(f"latency: {caveat}" for caveat in report.caveats())]
    lines += [f"not measured: {reason}" for reason in report.skipped]
    emit(report.model_copy(update={"examples": [], "mistakes": []}), as_json, "\n".join(lines))


main.add_command(fit)
main.add_command(op)
