"""``detr data``: looking at data sets and making synthetic ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import click

from detr.cli_support import Group, Number, counted, emit, json_option
from detr.errors import UserError


@click.group(cls=Group)
def data() -> None:
    """Check, show, convert and split data sets, or make synthetic ones.

    Example: detr data check kitti:runs/scenes:val
    """


@data.command()
@click.argument("data", metavar="DATA")
@click.option(
    "--masks", is_flag=True, help="Masks are wanted: what is wrong with them is an error."
)
@json_option
def check(data: str, masks: bool, as_json: bool) -> None:
    """List what is wrong with DATA and what is in it.

    Decodes every image and reads every label row. Masks that are there are looked at, too; only
    with --masks an object without one, or with one that cannot be read, is an error.

    DATA is FORMAT:PATH[:SPLIT] (kitti, coco, yolo, voc, bdd100k) or a YAML file. The exit status is
    2 where there are errors, which stop training and scoring too; warnings (what is left out or
    clipped) do not change it.

    Example: detr data check kitti:/data/kitti:train --json
    """
    from detr.data.check import check as run_check
    from detr.data.open import open_dataset

    report = run_check(open_dataset(data), masks)
    emit(report, as_json, report.text())
    if report.errors:
        errors = counted(len(report.errors), "error")
        raise UserError("data-check", f"{data}: {errors}, listed above")


@data.command()
@click.argument("data", metavar="DATA")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The page, .html.")
@click.option("--images", type=click.IntRange(1), default=24, show_default=True, help="How many.")
@json_option
def show(data: str, out: Path, images: int, as_json: bool) -> None:
    """Write a page of pictures of DATA with their boxes.

    The page needs no other file.

    Example: detr data show yolo:/data/road/data.yaml:val --out road.html
    """
    from detr.data.open import open_dataset
    from detr.data.show import show as write_page

    page = write_page(open_dataset(data), out, images)
    emit(page, as_json, f"{counted(page.images, 'image')} in {page.page}")


@data.command()
@click.argument("source", metavar="FROM")
@click.argument("to", metavar="TO")
@click.option("--link", is_flag=True, help="Link to the pictures instead of copying them.")
@click.option(
    "--polygons",
    is_flag=True,
    help="Write YOLO rows of polygons (masks), whose enclosing boxes then are the boxes.",
)
@json_option
def convert(source: str, to: str, link: bool, polygons: bool, as_json: bool) -> None:
    """Write the data set FROM in another format.

    TO is FORMAT:FOLDER[:SPLIT] with coco, kitti, yolo or voc. Another split may lie in the folder
    already; nothing is overwritten.

    Example: detr data convert coco:/data/road:val yolo:/data/road_yolo:val
    """
    from detr.data.convert import convert as write

    done = write(source, to, link, polygons)
    for note in done.notes:
        click.echo(f"note: {note}", err=True)
    text = f"{counted(done.images, 'image')}, {counted(done.objects, 'object')} in {done.data}"
    emit(done, as_json, text)


@data.command()
@click.argument("data", metavar="DATA")
@click.option("--val", type=Number(), default=0.2, show_default=True, help="Share of the images.")
@click.option("--seed", type=int, default=0, show_default=True, help="Same seed, same parts.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder for the lists.  [default: DATA's own]"
)
@json_option
def split(data: str, val: float, seed: int, out: Path | None, as_json: bool) -> None:
    """Divide the images of DATA at random into train and val.

    KITTI and VOC folders get lists train.txt and val.txt beside those they have; any other data set
    gets train.yaml and val.yaml. No other file changes.

    Example: detr data split kitti:/data/kitti --val 0.2 --seed 0
    """
    from detr.data.convert import split as divide

    parts = divide(data, val, seed, out)
    lines = [
        f"{parts.train}: {counted(parts.train_images, 'image')}",
        f"{parts.val}: {counted(parts.val_images, 'image')}",
    ]
    emit(parts, as_json, "\n".join(lines))


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
    "--val-fraction", type=Number(), default=0.2, show_default=True, help="Share of scenes in val."
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
