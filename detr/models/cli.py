"""``detr model``: what the detectors are."""

from __future__ import annotations

from pathlib import Path

import click

from detr.cli_support import Group, emit, json_option
from detr.data.cli import parse_size
from detr.model_info import read_model_info
from detr.models.describe import describe as describe_config
from detr.models.presets import preset


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
def model() -> None:
    """Look at detectors."""


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
