"""``export adopt``: an ONNX file of another project as a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click

from detr.cli_support import counted, emit, json_option
from detr.data.cli import parse_size
from detr.data.preprocess import PreprocessConfig
from detr.errors import UserError
from engines.bundle import Precision
from engines.msda_function import Lowering
from export.adopt.contract import Scores
from export.options import graph_options

# What images are before the network, by the name people know it under; see --pixels.
_PIXELS: dict[str, dict[str, Any]] = {
    "imagenet": {},
    "unit": {"mean": (0.0, 0.0, 0.0), "std": (255.0, 255.0, 255.0)},
}


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Bundle folder.")
@click.option(
    "--classes",
    type=click.Path(path_type=Path),
    required=True,
    help="JSON with names and category_ids, or a COCO annotation file: in the order of the class "
    "outputs, or fewer, each at the output of its category id.",
)
@click.option("--size", required=True, metavar="HxW", help="Size of the images it takes.")
@click.option(
    "--pixels",
    type=click.Choice(list(_PIXELS)),
    required=True,
    help="What it takes: 'imagenet', normalized by ImageNet's mean and deviation (DETR, Deformable "
    "DETR, RF-DETR, LW-DETR); 'unit', 0 to 1 (RT-DETR, D-FINE, DEIM).",
)
@click.option(
    "--scores",
    type=click.Choice(["sigmoid", "softmax"]),
    help="How class outputs become scores; known from their number, unless one is 'no object'.",
)
@click.option(
    "--detections",
    type=click.IntRange(min=1),
    help="Detections kept of an image; as many as there are queries by default.",
)
@graph_options
@json_option
def adopt(
    model: Path,
    out: Path,
    classes: Path,
    size: str,
    pixels: Literal["imagenet", "unit"],
    scores: Scores | None,
    detections: int | None,
    lowering: Lowering,
    precision: Precision,
    search_islands: bool,
    calibration: str | None,
    calibration_images: int,
    data: str | None,
    as_json: bool,
) -> None:
    """Make a bundle of MODEL, an ONNX file that another project exported.

    Deformable attention written as GridSample becomes one node each, inputs and outputs become the
    bundle's, and the result is compared with MODEL itself in ONNX Runtime before it takes its name;
    exit status 3 where it finds other things. What is not recognized is told and stays as it is.
    MODEL is not changed.

    Example: detr export adopt rtdetr.onnx --out rtdetr.bundle --classes coco.json --size 640x640
    --pixels unit
    """
    from detr.models.weights.classes import read_class_list
    from export.adopt.adopt import adopt as adopted_from
    from export.golden import dataset_images
    from export.precision.apply import check_request, request_precision

    check_request(precision, data, search_islands, calibration)
    canvas = parse_size(size)
    try:
        preprocess = PreprocessConfig(size=canvas, **_PIXELS[pixels])
    except ValueError as error:
        raise UserError("size-form", f"--size {size}: sides of 16 to 16384 pixels") from error
    names = read_class_list(classes)
    request = request_precision(
        precision, names, data, search_islands, calibration, calibration_images
    )
    images = None if data is None else dataset_images(data, names, preprocess)
    found = adopted_from(
        model, out, names, preprocess, scores, detections, lowering, images, request
    )
    info = found.bundle.info
    parity = info.parity.summary() if info.parity is not None else "nothing to compare"
    lines = [
        f"{out}: {counted(len(found.folds), 'deformable attention')} of {model} became nodes; "
        f"{info.precision}, opset {info.opset}, scores by {found.reading.scores}, "
        f"{counted(found.reading.detections, 'detection')}",
        f"ONNX Runtime against the original file: {parity}",
        *(f"left as it was: {reason}" for reason in found.left),
    ]
    emit(info, as_json, "\n".join(lines))
