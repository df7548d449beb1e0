"""Bundles of all models of an elastic run, and the command that chooses among them.

Exporting is ``detr export``'s and measuring ``detr bench``'s, asked for as command lines: there is
one gate and one way of measuring, and the rooms do not know each other. Exports follow one another
in this process, which has torch loaded; measuring gets one of its own.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path

import click

from detr.cli import main
from detr.cli_support import progress
from detr.errors import GateError, UserError
from detr.files import output_folder, sha256
from detr.models.extract import extract_file
from distill.elastic.choices import Choice
from distill.recipe import load_recipe
from engines.bundle import is_bundle
from engines.oriented import open_bundles


def _detr(arguments: Sequence[str]) -> None:
    # Standard output is the choice's; what an export says goes where progress goes.
    with redirect_stdout(sys.stderr):
        main.main(list(arguments), prog_name="detr", standalone_mode=False)


def export_all(
    run: Path, data: str, out: Path, call: Callable[[Sequence[str]], None] = _detr
) -> list[Path]:
    """Exports every model of an elastic run, each compared with torch on images of ``data``.

    A bundle that was made of the same weights before is kept.

    Args:
        run: Directory of a run of ``distill elastic``.
        data: Data set specification.
        out: Gets ``models/NAME.safetensors`` and ``bundles/NAME.bundle``.
        call: Runs ``detr`` with these arguments.

    Returns:
        The bundles; those that the gate rejects are said and left out.

    Raises:
        UserError: ``fit-run`` for a run that is none of ``distill elastic``, ``fit-rejected`` where
            the gate rejects all of them, and what reading the run and exporting raise.
    """
    choices = choices_of(run)
    for folder in (out / "models", out / "bundles"):
        output_folder(folder)
    bundles = []
    for choice in progress(choices, "exporting"):
        weights = out / "models" / f"{choice.name}.safetensors"
        layers = range(choice.encoder_layers), range(choice.decoder_layers)
        extract_file(run, weights, *layers, choice.queries, choice.size)
        bundle = out / "bundles" / f"{choice.name}.bundle"
        if _made_of(bundle, weights):
            bundles.append(bundle)
            continue
        command = ["export", "onnx", str(weights), "--out", str(bundle), "--data", data]
        try:
            call(command)
        except GateError as error:
            click.echo(f"left out: {error.message}", err=True)
            continue
        bundles.append(bundle)
    if not bundles:
        raise UserError("fit-rejected", f"{run}: the gate rejects every export (see above)")
    return bundles


def choices_of(run: Path) -> list[Choice]:
    """The models of an elastic run, from the smallest to the largest.

    Raises:
        UserError: ``fit-run``.
    """
    frozen = run / "recipe.yaml"
    if not frozen.is_file():
        raise UserError("fit-run", f"{run}: no run directory: {frozen} is not there")
    recipe = load_recipe(frozen)
    if recipe.elastic is None:
        raise UserError("fit-run", f"{run}: holds one model; `distill elastic` trains several")
    return recipe.elastic.choices(recipe.detector, recipe.input)


def measure(
    bundles: Sequence[Path],
    out: Path,
    options: Mapping[str, str],
    as_json: bool,
    call: Callable[[Sequence[str]], int] | None = None,
) -> None:
    """Measures the bundles of :func:`export_all` and chooses; what is printed is the choice.

    Args:
        bundles: All of them.
        out: Gets ``fit.json``, ``fit.svg`` and the report.
        options: Of ``detr bench fit``.
        as_json: Print it as JSON.
        call: Runs ``detr`` with these arguments and returns its exit status.

    Raises:
        SystemExit: With the exit status of ``detr bench fit``, which has said why.
    """
    command = ["bench", "fit", *map(str, bundles), "--out", str(out)]
    command += [part for option in options.items() for part in option]
    status = (call or _printing)([*command, *(["--json"] if as_json else [])])
    if status != 0:
        sys.exit(status)


def _made_of(bundle: Path, weights: Path) -> bool:
    """Whether a bundle is there and made of these weights."""
    if not is_bundle(bundle):
        return False
    return all(one.info.source.sha256 == sha256(weights) for one in open_bundles(bundle))


def _printing(arguments: Sequence[str]) -> int:
    return subprocess.run([sys.executable, "-m", "detr", *arguments], check=False).returncode
