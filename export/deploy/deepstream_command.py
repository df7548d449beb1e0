"""``export deepstream``: a bundle as the element ``nvinfer`` takes it."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from detr.cli_support import Number, emit, json_option
from detr.errors import UserError
from engines.bundle import open_bundle


def frame_size(text: str) -> tuple[int, int]:
    """Height and width of ``1080x1920``.

    Raises:
        UserError: ``size-form``.
    """
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) > 0 and int(width) > 0):
        raise UserError("size-form", f"--frame {text!r}: expected HEIGHTxWIDTH, such as 1080x1920")
    return int(height), int(width)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder.")
@click.option(
    "--frame",
    default="1080x1920",
    show_default=True,
    metavar="HxW",
    help="Size of the streams' frames; others of this aspect are right, too.",
)
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Frames at once, of a bundle with a dynamic batch.",
)
@click.option(
    "--score",
    type=Number(0, 1),
    default=0.3,
    show_default=True,
    help="Drop what scores less.",
)
@json_option
def deepstream(
    bundle: Path, out: Path, frame: str, batch: int, score: float, as_json: bool
) -> None:
    """Write BUNDLE for NVIDIA DeepStream.

    Writes nvinfer's configuration, the labels, a graph from frames to detections and the sources of
    the parser nvinfer loads.

    Example: detr export deepstream student.bundle --out deepstream --frame 1080x1920 --batch 4
    """
    from export.deploy.deepstream import CONFIG, write_deepstream
    from export.parity.evidence import refuse_rejected

    opened = open_bundle(bundle)
    if opened.info.batch not in ("dynamic", batch) and batch != 1:
        raise UserError(
            "option-batch",
            f"--batch {batch}: {bundle} was exported for {opened.info.batch}; export it with "
            "--batch dynamic",
        )
    refuse_rejected(opened)
    made = write_deepstream(opened, out, frame_size(frame), batch, score)
    source = shlex.quote(str(out))
    emit(
        {"folder": str(out), "batch": made.batch, "frame": list(made.frame)},
        as_json,
        f"{out / CONFIG}: frames of {made.frame[0]}x{made.frame[1]}, batch {made.batch}; build the "
        f"parser with: cmake -S {source} -B {source}/build && cmake --build {source}/build",
    )
