"""``detr model``: what the detectors are."""

from __future__ import annotations

from pathlib import Path

import click
from pydantic import BaseModel

from detr.cli_support import Group, emit, json_option
from detr.data.cli import parse_size
from detr.errors import UserError
from detr.model_info import read_model_info
from detr.models.checkpoint import load_model
from detr.models.describe import describe as describe_config
from detr.models.describe import parameters
from detr.models.extract import extract_file
from detr.presets import preset


class ExtractReport(BaseModel):
    """What ``detr model extract`` did.

    Attributes:
        source, out: Where from and where to.
        encoder, decoder: The layers kept.
        queries: How many.
        size: Canvas (height, width); ``None`` where it follows the images.
        parameters: Number of parameters of what was written.
    """

    source: str
    out: str
    encoder: list[int]
    decoder: list[int]
    queries: int
    size: tuple[int, int] | None
    parameters: int

    def text(self) -> str:
        """One line for the terminal."""
        kept = [",".join(map(str, x)) or "none" for x in (self.encoder, self.decoder)]
        return (
            f"{self.out}: encoder layers {kept[0]}, decoder layers {kept[1]} of {self.source}, "
            f"{self.queries} queries, {self.parameters / 1e6:.2f} M parameters"
        )


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
def model() -> None:
    """Look at detectors and cut them down."""


@model.command()
@click.argument("name")
@click.option("--size", default="800x1333", show_default=True, help="Canvas HEIGHTxWIDTH.")
@click.option("--classes", default=80, show_default=True, help="Classes of a preset.")
@click.option("--timed/--not-timed", default=True, help="Also run it on this machine's CPU.")
@json_option
def describe(name: str, size: str, classes: int, timed: bool, as_json: bool) -> None:
    """Print parameters, GFLOPs, tokens and the share of time per part.

    NAME is a preset such as dino-r50 or a checkpoint (.safetensors with its .json).

    Example: detr model describe dino-r50 --size 402x1333
    """
    canvas = parse_size(size)
    if name.endswith(".safetensors"):
        config = read_model_info(Path(name).with_suffix(".json")).detector
    else:
        config = preset(name, classes)
    found = describe_config(config, name, canvas, timed)
    emit(found, as_json, found.text())


@model.command()
@click.argument("teacher", type=click.Path(path_type=Path))
@click.option("--encoder", help="Encoder layers kept, from 0, such as 0,2,5; none keeps none.")
@click.option("--decoder", help="Decoder layers kept, such as 0,5.")
@click.option("--queries", type=click.IntRange(min=1), help="Queries kept, the first ones.")
@click.option("--size", help="Another canvas, HEIGHTxWIDTH.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="X.safetensors.")
@json_option
def extract(
    teacher: Path,
    encoder: str | None,
    decoder: str | None,
    queries: int | None,
    size: str | None,
    out: Path,
    as_json: bool,
) -> None:
    """Cut layers and queries out of a checkpoint, all other weights kept.

    TEACHER is a .safetensors file, a run directory or the name of a shipped model. Layers are named
    in ascending order; a part whose option is left out keeps all of its layers. Of a run of
    `distill elastic`, the first layers are a model that was trained.

    Example: detr model extract runs/teacher --encoder 0,2,5 --decoder 0,5 --out student.safetensors
    """
    layers = {"encoder": _layers(encoder, "encoder"), "decoder": _layers(decoder, "decoder")}
    canvas = None if size is None else parse_size(size)
    info = extract_file(teacher, out, **layers, queries=queries, size=canvas)
    kept = info.provenance["extracted"]
    report = ExtractReport(
        source=str(teacher),
        out=str(out),
        encoder=kept["encoder"],
        decoder=kept["decoder"],
        queries=kept["queries"],
        size=info.preprocess.size,
        parameters=parameters(load_model(out)[0])["total"],
    )
    emit(report, as_json, report.text())


def _layers(text: str | None, part: str) -> list[int] | None:
    """``0,2,5`` as numbers; ``none`` is none, no text is ``None``."""
    if text is None:
        return None
    if text == "none":
        return []
    try:
        return [int(number) for number in text.split(",")]
    except ValueError as error:
        raise UserError(
            "extract-layer-map", f"--{part} {text!r}: expected numbers such as 0,2,5, or none"
        ) from error
