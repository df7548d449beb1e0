"""Options of the commands that write a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from detr.cli_support import process_threads_option

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = (
    click.option(
        "--lowering",
        type=click.Choice(["gridsample", "gather"]),
        default="gridsample",
        show_default=True,
        help="How runtimes without our kernel compute deformable attention.",
    ),
    click.option(
        "--precision",
        type=click.Choice(["fp32", "fp16", "int8"]),
        default="fp32",
        show_default=True,
        help="Types written into the graph.",
    ),
    click.option(
        "--search-islands",
        is_flag=True,
        help="Find the smallest float32 island within the parity budget, on images of --data.",
    ),
    click.option("--calibration", help="Data set int8 takes the scales of its activations from."),
    click.option(
        "--calibration-images",
        type=click.IntRange(min=1),
        default=64,
        show_default=True,
        help="How many of its images, spread evenly.",
    ),
    click.option("--data", help="Data set to take the golden images from; drawn ones by default."),
    process_threads_option,
)


def graph_options(command: F) -> F:
    """Body of the attention, precision and what it is found by, source of images, threads."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
