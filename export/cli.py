"""``detr export``: checkpoints to bundles."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from detr.cli_support import Group, emit, json_option
from detr.errors import UserError
from detr.shipped import find_model
from engines.bundle import Precision
from engines.msda_function import Lowering
from export.trt import trt


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Turn checkpoints into bundles that run anywhere and prove themselves.

    Example: detr export onnx runs/student --out student.bundle
    """


main.add_command(trt)


@main.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Bundle folder.")
@click.option(
    "--opset",
    type=click.Choice(["17", "18"]),
    default="17",
    show_default=True,
    help="ONNX operator set.",
)
@click.option(
    "--batch",
    default="1",
    show_default=True,
    metavar="N|dynamic",
    help="Images per run.",
)
@click.option(
    "--lowering",
    type=click.Choice(["gridsample", "gather"]),
    default="gridsample",
    show_default=True,
    help="How runtimes without our kernel compute deformable attention.",
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16"]),
    default="fp32",
    show_default=True,
    help="Types written into the graph.",
)
@click.option("--data", help="Data set to take the golden images from; drawn ones by default.")
@json_option
def onnx(
    checkpoint: Path,
    out: Path,
    opset: str,
    batch: str,
    lowering: Lowering,
    precision: Precision,
    data: str | None,
    as_json: bool,
) -> None:
    """Export CHECKPOINT (weights, a run directory or a shipped model) to an ONNX bundle.

    The bundle is run in ONNX Runtime and compared with torch before it is kept.

    Example: detr export onnx runs/student --out student.bundle --opset 17 --batch 1
    """
    from detr.models import load_model
    from export.golden import dataset_images
    from export.onnx_export import export_bundle

    checkpoint, size = find_model(checkpoint), _batch(batch)
    images = None
    if data is not None:
        images = dataset_images(data, load_model(checkpoint)[1].classes)
    bundle = export_bundle(checkpoint, out, int(opset), size, lowering, images, precision)
    parity = bundle.info.parity or {}
    emit(
        bundle.info,
        as_json,
        f"{out}: {precision}, opset {opset}, batch {batch}, {lowering}; ONNX Runtime to torch: "
        f"{parity['matched']} detections, boxes within {parity['max_box_px']:.2g} px, "
        f"scores within {parity['max_score']:.2g}",
    )


def _batch(text: str) -> int | Literal["dynamic"]:
    if text == "dynamic":
        return "dynamic"
    if not text.isdecimal() or int(text) < 1:
        raise UserError("option-batch", f"--batch {text!r}: a positive number or 'dynamic'")
    return int(text)
