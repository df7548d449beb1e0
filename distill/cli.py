"""The command ``distill``: train a teacher or a baseline, distil a student."""

from __future__ import annotations

from pathlib import Path

import click

from detr.cli_support import (
    Group,
    Number,
    emit,
    json_option,
    process_threads_option,
    threads_option,
)
from detr.data import open_dataset
from detr.errors import UserError
from distill.recipe import Recipe, find_recipe, load_recipe, shipped

_settings = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a recipe value: --set optimizer.lr=0.0002 (repeatable; the value is YAML).",
)
_out = click.option(
    "--out", type=click.Path(path_type=Path), help="Run directory; runs/NAME by default."
)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Train detectors and distil large ones into small ones.

    Example: distill run demo-student
    """


@main.command()
@click.argument("recipe")
@_settings
@process_threads_option
@_out
def train(recipe: str, overrides: tuple[str, ...], out: Path | None) -> None:
    """Train a detector on labels alone: a teacher or a baseline.

    RECIPE is a YAML file or a shipped name (`distill recipes`). A recipe's teacher and methods are
    left out. The same command again goes on where it stopped.

    Example: distill train demo-teacher --set steps=2000 --out runs/teacher
    """
    loaded = load_recipe(find_recipe(recipe), overrides)
    plain = loaded.without_teacher()
    if left_out := [key for key, value in loaded if value != getattr(plain, key)]:
        click.echo(
            f"labels alone: left out {', '.join(left_out)}; `detr distill run` takes them", err=True
        )
    _run(plain, out)


@main.command()
@click.argument("recipe")
@_settings
@click.option(
    "--min-teacher-ap",
    type=Number(0, 1),
    help="Refuse a teacher below this AP; the same as --set min_teacher_ap=...",
)
@process_threads_option
@_out
def run(
    recipe: str, overrides: tuple[str, ...], min_teacher_ap: float | None, out: Path | None
) -> None:
    """Distil a student from a teacher.

    RECIPE is a YAML file or a shipped name with methods and, for most of them, a teacher. The same
    command again goes on where it stopped.

    Example: distill run demo-student --set teacher=runs/teacher --out runs/student
    """
    if min_teacher_ap is not None:
        overrides = (*overrides, f"min_teacher_ap={min_teacher_ap}")
    path = find_recipe(recipe)
    loaded = load_recipe(path, overrides, methods=True)
    _check_methods(loaded, path)
    if loaded.elastic is not None:
        raise UserError(
            "recipe-elastic",
            f"{path}: is for several students in one (elastic), which `distill elastic` trains; "
            "--set elastic=null for one",
        )
    _run(loaded, out)


@main.command()
@click.argument("recipe")
@_settings
@_out
def elastic(recipe: str, overrides: tuple[str, ...], out: Path | None) -> None:
    """Distil many students in one training: every depth a recipe lists.

    RECIPE is a YAML file or a shipped name with a section `elastic`, which lists numbers of encoder
    and decoder layers, queries and canvases. Afterwards every combination is a model: `detr model
    extract` cuts one out, `distill fit` chooses by a budget. The same command again goes on where
    it stopped.

    Example: detr distill elastic demo-elastic --out runs/elastic
    """
    path = find_recipe(recipe)
    loaded = load_recipe(path, overrides, methods=True)
    _check_methods(loaded, path)
    if loaded.elastic is None:
        raise UserError(
            "recipe-not-elastic",
            f"{path}: has no section elastic, such as elastic: {{decoder_layers: [1, 2, 3]}}",
        )
    _run(loaded, out)


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--budget-ms",
    required=True,
    type=Number(min=0, min_open=True),
    help="Most milliseconds end to end for nine images of ten (p90).",
)
@click.option("--engine", required=True, metavar="NAME", help="Runtime, as of bench run.")
@click.option("--data", required=True, help="kitti:PATH[:SPLIT], coco:PATH[:SPLIT] or a YAML file.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder; RUN/fit by default.")
@click.option("--limit", type=click.IntRange(min=1), help="Use this many images, spread evenly.")
@click.option(
    "--iterations", type=click.IntRange(min=1), help="Timed calls of each; 50 by default."
)
@threads_option
@json_option
def fit(
    run: Path,
    budget_ms: float,
    engine: str,
    data: str,
    out: Path | None,
    limit: int | None,
    iterations: int | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Choose a model of an elastic RUN by a latency on this device.

    Exports every combination to a bundle in OUT/bundles, and measures them with `detr bench fit`,
    which is all that a target without torch needs: carry the folder there. The same command again
    exports no bundle twice.

    Example: detr distill fit runs/elastic --budget-ms 20 --engine openvino --data kitti:/k:val
    """
    from distill.elastic.fit import export_all, measure
    from engines.open import check_name

    check_name(engine)
    folder = run / "fit" if out is None else out
    bundles = export_all(run, data, folder)
    options = {"--budget-ms": f"{budget_ms:g}", "--engine": engine, "--data": data}
    further = {"--limit": limit, "--iterations": iterations, "--threads": threads}
    options |= {name: str(value) for name, value in further.items() if value is not None}
    measure(bundles, folder, options, as_json)


@main.command()
@click.argument("recipe")
@click.option(
    "--methods", "names", required=True, help="Comma-separated; join with + to add methods up."
)
@click.option(
    "--seeds", type=click.IntRange(1), default=1, show_default=True, help="Runs of every method."
)
@click.option("--data", help="Data set without its split, such as kitti:data/demo.")
@_settings
@click.option(
    "--threads", type=click.IntRange(1), help="Of each training; 1 with --ray, else torch's choice."
)
@click.option(
    "--ray",
    "address",
    metavar="ADDRESS",
    help="Train side by side on Ray: local, or a cluster's address, such as auto.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder of cells and table."
)
@json_option
def compare(
    recipe: str,
    names: str,
    seeds: int,
    data: str | None,
    overrides: tuple[str, ...],
    threads: int | None,
    address: str | None,
    out: Path,
    as_json: bool,
) -> None:
    """Train one student with several methods; one table.

    The first row is trained without any. Where the recipe inherits the teacher's weights, one row
    does that and nothing else. The same command again goes on where it stopped; a run that fails
    does not stop the others.

    Example: distill compare demo-student --methods qskd,fgd+mgd --seeds 2 --out runs/compare
    """
    from distill.analysis.cells import in_processes, on_ray
    from distill.analysis.compare_methods import compare_methods

    if data is not None:
        overrides = (f"data.train={data}:train", f"data.val={data}:val", *overrides)
    methods = [name.strip() for name in names.split(",") if name.strip()]
    if not methods:
        raise UserError("usage", "--methods names no method; see distill methods")
    loaded = load_recipe(find_recipe(recipe), overrides, methods=True)
    for spec in filter(None, (loaded.data.train, loaded.data.val)):
        open_dataset(spec)  # a mistake here would fail every run, one after the other
    run = in_processes(threads) if address is None else on_ray(address, threads or 1)
    table = compare_methods(loaded, methods, seeds, out, run)
    emit(table, as_json, table.to_markdown())
    if failed := [cell for cell in table.cells if cell.error]:
        raise UserError(
            "compare-failed",
            f"{out}: {len(failed)} of {len(table.cells)} runs failed, for the reasons below the "
            "table; the same command again repeats only these",
        )


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--data", required=True, help="kitti:PATH[:SPLIT], coco:PATH[:SPLIT] or a YAML file.")
@click.option("--teacher", type=click.Path(path_type=Path), help="Run, model file or shipped name.")
@click.option("--baseline", type=click.Path(path_type=Path), help="Run without a teacher.")
@click.option(
    "--images",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Look at this many, spread evenly.",
)
@process_threads_option
@json_option
def diagnose(
    run: Path,
    data: str,
    teacher: Path | None,
    baseline: Path | None,
    images: int,
    as_json: bool,
) -> None:
    """Show how steady a run's matching is and where it looks.

    Writes diagnosis.html and diagnosis.json into RUN, a run directory; weights in one, such as
    runs/student/ema.safetensors, get files of their own.

    Example: distill diagnose runs/student --data kitti:data/demo:val --teacher demo-teacher
    """
    from distill.analysis.diagnosis import diagnose as examine
    from distill.analysis.diagnosis import page_path
    from distill.analysis.diagnosis_page import render

    result = examine(run, data, teacher, baseline, images, render)
    click.echo(f"wrote {page_path(run)} (.json beside it)", err=True)
    emit(result, as_json, result.text())


@main.command()
@json_option
def methods(as_json: bool) -> None:
    """List the distillation methods a recipe can name.

    Example: distill methods --json
    """
    from distill.methods import METHODS

    rows = {name: (kind.__doc__ or "").strip().splitlines()[0] for name, kind in METHODS.items()}
    emit(rows, as_json, _table(rows))


@main.command()
@json_option
def recipes(as_json: bool) -> None:
    """List the recipes that come with the package.

    Example: distill recipes
    """
    rows = {name: _first_comment(path) for name, path in shipped().items()}
    emit(rows, as_json, _table(rows))


def _check_methods(recipe: Recipe, path: Path) -> None:
    if not recipe.methods:
        raise UserError(
            "recipe-not-distillation",
            f"{path}: has no methods; add some, or train on labels alone with `distill train`",
        )


def _run(recipe: Recipe, out: Path | None) -> None:
    # Imported here: listing recipes should not wait for timm.
    from distill.training.loop import train as train_recipe

    model = train_recipe(recipe, out or Path("runs") / recipe.name)
    click.echo(model)


def _first_comment(path: Path) -> str:
    """The recipe's own headline: its first line, a comment."""
    return path.read_text().splitlines()[0].lstrip("# ")


def _table(rows: dict[str, str]) -> str:
    width = max(map(len, rows), default=0)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows.items())
