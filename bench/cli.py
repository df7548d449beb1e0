"""``detr bench``: average precision and latency of artefacts."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from bench.op_msda import op
from detr.cli_support import LazyGroup, emit, json_option
from detr.data import open_dataset

# By name: what a training step costs is known to the room above this one.
_ABOVE = {
    "train-step": (
        "distill.step_cost:command",
        "Split a training step into student, teacher, extra queries, matching and losses.",
    )
}


@click.group(cls=LazyGroup, lazy=_ABOVE, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Measure average precision and latency of the same artefact.

    Example: detr bench run student.bundle --data kitti:/data/kitti:val
    """


@main.command()
@click.argument(
    "models", metavar="BUNDLE...", nargs=-1, required=True, type=click.Path(path_type=Path)
)
@click.option("--data", required=True, help="kitti:PATH[:SPLIT], coco:PATH[:SPLIT] or a YAML file.")
@click.option(
    "--engine",
    type=click.Choice(["native", "onnxruntime", "torch"]),
    help="Runtime; the best at hand for each model by default.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder for report.json, .md, .csv and .html; only printed without it.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Use this many images, spread evenly.")
@click.option(
    "--iterations",
    type=click.IntRange(min=1),
    default=50,
    show_default=True,
    help="Timed calls per model.",
)
@json_option
def run(
    models: tuple[Path, ...],
    data: str,
    engine: str | None,
    out: Path | None,
    limit: int | None,
    iterations: int,
    as_json: bool,
) -> None:
    """Measure AP and latency of each BUNDLE (or checkpoint) on DATA.

    Example: detr bench run teacher.bundle student.bundle --data kitti:/data/kitti:val --out report
    """
    from bench.run import run as measure

    arguments = ["detr", "bench", "run", *map(str, models), "--data", data]
    for option, value in (("--engine", engine), ("--out", out), ("--limit", limit)):
        if value is not None:
            arguments += [option, str(value)]
    arguments += ["--iterations", str(iterations)]
    report = measure(models, data, engine, limit, iterations, [shlex.join(arguments)])
    if out is not None:
        page = report.write(out)[-1]
        click.echo(f"wrote {page} (.json, .md, .csv beside it)", err=True)
    emit(report.model_copy(update={"examples": []}), as_json, "\n".join(report.verdict()))


@main.command()
@click.argument("detections", type=click.Path(path_type=Path))
@click.option("--data", required=True, help="kitti:PATH[:SPLIT], coco:PATH[:SPLIT] or a YAML file.")
@click.option(
    "--protocol",
    type=click.Choice(["coco", "kitti"]),
    help="By default kitti for KITTI result files of KITTI data, else coco.",
)
@json_option
def score(detections: Path, data: str, protocol: str | None, as_json: bool) -> None:
    """Score DETECTIONS (a COCO results file or a folder of KITTI result files) against DATA.

    Needs the labels only: no images, no model.

    Example: detr bench score results_folder --data kitti:/data/kitti:val --protocol kitti
    """
    from bench import score as scoring

    result = scoring.score(detections, open_dataset(data), protocol)  # type: ignore[arg-type]
    emit(result, as_json, result.text())


main.add_command(op)
