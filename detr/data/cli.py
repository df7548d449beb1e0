"""``detr data``: looking at data sets and making synthetic ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import click

from detr.cli_support import Group, counted, emit, json_option
from detr.errors import UserError


@click.group(cls=Group)
def data() -> None:
    """Check a data set, or make a synthetic one.

    Example: detr data check kitti:runs/scenes:val
    """


@data.command()
@click.argument("data", metavar="DATA")
@json_option
def check(data: str, as_json: bool) -> None:
    """List what is wrong with DATA and what is in it.

    Decodes every image and reads every label row.

    DATA is kitti:PATH[:SPLIT], coco:PATH[:SPLIT] or a YAML file. The exit status is 2 where there
    are errors; warnings (boxes that are skipped or clipped) do not change it.

    Example: detr data check kitti:/data/kitti:train --json
    """
    from detr.data.check import check as run_check
    from detr.data.open import open_dataset

    report = run_check(open_dataset(data))
    emit(report, as_json, report.text())
    if report.errors:
        errors = counted(len(report.errors), "error")
        raise UserError("data-check", f"{data}: {errors}, listed above")


def parse_size(text: str) -> tuple[int, int]:
    """``HxW`` to (height, width).

    Raises:
        UserError: ``size-form``.
    """
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if match is None:
        raise UserError("size-form", f"--size {text!r}: expected HEIGHTxWIDTH, such as 128x416")
    return int(match[1]), int(match[2])


@data.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--images", type=int, default=200, show_default=True, help="How many scenes.")
@click.option("--size", default="128x416", show_default=True, help="HEIGHTxWIDTH in pixels.")
@click.option("--seed", type=int, default=0, show_default=True, help="Same seed, same pictures.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["kitti", "coco"]),
    default="kitti",
    show_default=True,
    help="Folder layout.",
)
@click.option(
    "--val-fraction", type=float, default=0.2, show_default=True, help="Share of scenes in val."
)
def synth(
    out: Path,
    images: int,
    size: str,
    seed: int,
    form: Literal["kitti", "coco"],
    val_fraction: float,
) -> None:
    """Make synthetic road scenes with labels in a new folder OUT.

    They are split into train and val; the same seed and size give the same pictures.

    Example: detr data synth runs/scenes --images 500 --size 128x416 --seed 1
    """
    from detr.data.synth import generate

    generate(out, images, parse_size(size), seed, form, val_fraction)
    click.echo(f"{images} scenes in {form}:{out}")
