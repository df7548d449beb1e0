"""``detr bench fit``: the best of a folder of bundles within a latency, on this device."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from bench.fit.choose import candidates
from bench.fit.choose import fit as choose_fit
from bench.options import data_option, iterations_option, limit_option, models_argument
from detr.cli_support import Number, emit, json_option, threads_option
from detr.errors import GateError
from detr.files import output_folder, write_atomic


@click.command()
@models_argument
@data_option
@click.option("--engine", required=True, metavar="NAME", help="Runtime, as of bench run.")
@click.option(
    "--budget-ms",
    required=True,
    type=Number(min=0, min_open=True),
    help="Most milliseconds end to end for nine images of ten (p90).",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder for fit.json, fit.svg and the report; only printed without it.",
)
@limit_option
@iterations_option
@threads_option
@json_option
def fit(
    models: tuple[Path, ...],
    data: str,
    engine: str,
    budget_ms: float,
    out: Path | None,
    limit: int | None,
    iterations: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Choose the most accurate BUNDLE within a latency.

    A BUNDLE may be a folder of bundles, such as those `detr distill fit` leaves behind. Each is
    measured on this device, AP and latency of the same artifact; the most accurate one that holds
    the budget, and holds it when it is timed again, is kept. Exit status 3 where none does.

    Example: detr bench fit bundles --data kitti:/k:val --engine openvino --budget-ms 20 --out fit
    """
    arguments = ["detr", "bench", "fit", *map(str, models), "--data", data, "--engine", engine]
    arguments += ["--budget-ms", f"{budget_ms:g}", "--iterations", str(iterations)]
    options = {"--out": out, "--limit": limit, "--threads": threads}
    for option, value in options.items():
        arguments += [] if value is None else [option, str(value)]
    if out is not None:
        output_folder(out)
    found, report = choose_fit(
        candidates(models), engine, data, budget_ms, limit, iterations, [shlex.join(arguments)],
        threads=threads,
    )  # fmt: skip
    if out is not None:
        from bench.fit.picture import picture
        from bench.report.write import write_report

        write_report(report, out)
        write_atomic(out / "fit.json", found.model_dump_json(indent=2) + "\n")
        write_atomic(out / "fit.svg", picture(found))
        click.echo(f"wrote {out / 'fit.svg'} (.json and report.html beside it)", err=True)
    emit(found, as_json, found.text())
    if found.kept is None:
        fastest = min(found.candidates, key=lambda one: one.p90_ms)
        raise GateError(
            "fit-budget",
            f"none of {len(found.candidates)} candidates holds {budget_ms:g} ms; the fastest, "
            f"{fastest.name}, takes {fastest.p90_ms:.4g} ms (p90)",
        )
