"""``detr export``: checkpoints to bundles."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from detr.cli_support import LazyGroup, emit, json_option
from detr.errors import UserError
from detr.shipped import find_model
from engines.bundle import Bundle, Precision
from engines.evidence import read_evidence
from engines.msda_function import Lowering
from export import target_cli


@click.group(
    cls=LazyGroup,
    lazy={
        "trt": ("export.trt:trt", "Build a bundle's TensorRT engine."),
        "verify": (
            "export.verify_cli:verify",
            "Check that a bundle finds what torch finds.",
        ),
    },
    context_settings={"help_option_names": ["-h", "--help"]},
)
def main() -> None:
    """Turn checkpoints into bundles that run anywhere and prove themselves.

    Example: detr export onnx runs/student --out student.bundle
    """


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
    type=click.Choice(["fp32", "fp16", "int8"]),
    default="fp32",
    show_default=True,
    help="Types written into the graph.",
)
@click.option(
    "--search-islands",
    is_flag=True,
    help="Find the smallest float32 island within the parity budget, on images of --data.",
)
@click.option("--calibration", help="Data set int8 takes the scales of its activations from.")
@click.option(
    "--calibration-images",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="How many of its images, spread evenly.",
)
@click.option("--data", help="Data set to take the golden images from; drawn ones by default.")
@click.option("--no-verify", is_flag=True, help="Do not compare the bundle with torch.")
@json_option
def onnx(
    checkpoint: Path,
    out: Path,
    opset: str,
    batch: str,
    lowering: Lowering,
    precision: Precision,
    search_islands: bool,
    calibration: str | None,
    calibration_images: int,
    data: str | None,
    no_verify: bool,
    as_json: bool,
) -> None:
    """Export CHECKPOINT to an ONNX bundle.

    CHECKPOINT is a .safetensors file, a run directory or a shipped model's name.

    The bundle is run in ONNX Runtime and compared with torch before it takes its name; exit status
    3 where it finds other things. With int8 or
    --search-islands, and labels in --data, AP, latency and size are compared with the other
    precisions.

    Example: detr export onnx runs/student --out student.bundle --precision fp16
    """
    from detr.models import load_model
    from export.golden import dataset_images
    from export.onnx_export import export_bundle
    from export.precise import check_request, request_precision

    check_request(precision, data, search_islands, calibration)
    checkpoint, size = find_model(checkpoint), _batch(batch)
    classes = load_model(checkpoint)[1].classes
    request = request_precision(
        precision, classes, data, search_islands, calibration, calibration_images
    )
    images = None if data is None else dataset_images(data, classes)
    bundle = export_bundle(
        checkpoint, out, int(opset), size, lowering, images, request, not no_verify
    )
    emit(bundle.info, as_json, _told(bundle))


def _told(bundle: Bundle) -> str:
    """What was exported, for a person."""
    from export.islands import Search
    from export.verdict import Verdict

    info = bundle.info
    text = (
        f"{bundle.path}: {info.precision}, opset {info.opset}, batch {info.batch}, "
        f"{info.lowering}; {_proof(bundle)}"
    )
    if info.precision != "fp32":
        text += f"\nfloat32 island: {', '.join(info.island) or 'none'}"
    if "search" in info.precision_report:
        text += "\n" + Search.model_validate(info.precision_report["search"]).table()
    if "verdict" in info.precision_report:
        text += "\n" + Verdict.model_validate(info.precision_report["verdict"]).table()
    return text


def _proof(bundle: Bundle) -> str:
    """What the parity gate said when the bundle was made."""
    from export.parity import Parity

    if bundle.info.parity is None:
        return "not compared with torch"
    found = f"ONNX Runtime against torch: {Parity.model_validate(bundle.info.parity).summary()}"
    if read_evidence(bundle.path).status == "accepted":
        return found
    return (
        f"{found}\ntoo little was found to judge by; compare it on images with objects in them: "
        f"detr export verify {bundle.path} --data DATA"
    )


def _batch(text: str) -> int | Literal["dynamic"]:
    if text == "dynamic":
        return "dynamic"
    if not text.isdecimal() or int(text) < 1:
        raise UserError("option-batch", f"--batch {text!r}: a positive number or 'dynamic'")
    return int(text)


main.add_command(target_cli.triton)
main.add_command(target_cli.cpp)
