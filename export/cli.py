"""``detr export``: checkpoints to bundles."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import click
from pydantic import BaseModel

from detr.cli_support import LazyGroup, emit, json_option, threads_option
from detr.errors import UserError
from detr.shipped import find_model
from engines.bundle import Bundle, Precision, open_bundle
from engines.evidence import read_evidence
from engines.msda_function import Lowering
from engines.oriented import open_bundles
from export.options import graph_options


@click.group(
    cls=LazyGroup,
    lazy={
        "adopt": (
            "export.adopt.command:adopt",
            "Make a bundle of an ONNX file of another project.",
        ),
        "deepstream": (
            "export.deploy.deepstream_command:deepstream",
            "Write a bundle for NVIDIA DeepStream.",
        ),
        "check": ("export.deploy.sign:check", "Check that a bundle is as its owner signed it."),
        "sign": ("export.deploy.sign:sign", "Sign a bundle with everything in it."),
        "trt": ("export.deploy.tensorrt:trt", "Build a bundle's TensorRT engine."),
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
@graph_options
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

    CHECKPOINT is a .safetensors file, a run directory or a shipped model's name. One at the papers'
    sizes (short and long side) becomes two bundles in one folder, for landscape and for portrait
    images.

    The bundle is run in ONNX Runtime and compared with torch before it takes its name; exit status
    3 where it finds other things. With int8 or
    --search-islands, and labels in --data, AP, latency and size are compared with the other
    precisions.

    Example: detr export onnx runs/student --out student.bundle --precision fp16
    """
    from detr.models import load_model
    from export.bundle import RejectedExport
    from export.golden import dataset_images
    from export.oriented import export_bundles
    from export.precision.apply import check_request, request_precision

    check_request(precision, data, search_islands, calibration)
    checkpoint, size = find_model(checkpoint), _batch(batch)
    info = load_model(checkpoint)[1]
    classes = info.classes
    request = request_precision(
        precision, classes, data, search_islands, calibration, calibration_images
    )
    images = None if data is None else dataset_images(data, classes, info.preprocess)
    try:
        bundles = export_bundles(
            checkpoint, out, int(opset), size, lowering, images, request, not no_verify
        )
    except RejectedExport as error:
        # What was measured took minutes and says what to do next.
        emit(error.bundle.info, as_json, _bundle_text(error.bundle))
        raise
    _emit_all(bundles, [bundle.info for bundle in bundles], as_json, map(_bundle_text, bundles))


def _shows(data: str, bundle: Bundle) -> bool:
    """Whether a data set has images of a bundle's orientation; says so where it has none."""
    from detr.data import open_dataset
    from export.parity.samples import images_for

    model = bundle.info.model
    found = bool(images_for(open_dataset(data, model.classes), 1, model.preprocess))
    if not found:
        click.echo(
            f"{bundle.path}: {data} has no image of its orientation; compared on its golden images",
            err=True,
        )
    return found


def _emit_all(
    bundles: Sequence[Bundle], results: Sequence[BaseModel], as_json: bool, texts: Iterable[str]
) -> None:
    """Prints what is known of a bundle, or of the two of a model at the papers' sizes."""
    by_name = {
        bundle.path.name: result.model_dump(mode="json")
        for bundle, result in zip(bundles, results, strict=True)
    }
    emit(results[0] if len(results) == 1 else by_name, as_json, "\n".join(texts))


def _bundle_text(bundle: Bundle) -> str:
    """What was exported, for a person."""
    info = bundle.info
    text = (
        f"{bundle.path}: {info.precision}, opset {info.opset}, batch {info.batch}, "
        f"{info.lowering}; {_gate_text(bundle)}"
    )
    if info.precision != "fp32":
        text += f"\nfloat32 island: {', '.join(info.island) or 'none'}"
    table = info.precision_report.table()
    return f"{text}\n{table}" if table else text


def _gate_text(bundle: Bundle) -> str:
    """What the parity gate said when the bundle was made."""
    if bundle.info.parity is None:
        return "not compared with torch"
    parity = f"ONNX Runtime against torch: {bundle.info.parity.summary()}"
    evidence = read_evidence(bundle.path)
    if evidence.status == "accepted":
        return parity
    if evidence.status == "rejected":
        return "\n".join(["rejected", *(v.text() for v in evidence.verdicts.values())])
    return (
        f"{parity}\ntoo little was found to judge by; compare it on images with objects in them: "
        f"detr export verify {bundle.path} --data DATA"
    )


def _batch(text: str) -> int | Literal["dynamic"]:
    if text == "dynamic":
        return "dynamic"
    if not text.isdecimal() or int(text) < 1:
        raise UserError("option-batch", f"--batch {text!r}: a positive number or 'dynamic'")
    return int(text)


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--data", help="Data set to compare on; the bundle's golden images by default.")
@click.option(
    "--engine",
    "engines",
    multiple=True,
    metavar="NAME",
    help="Also judge this engine (native, openvino, ...); may be repeated.",
)
@click.option(
    "--budget",
    type=click.Path(path_type=Path),
    help="YAML or JSON with what is allowed; the default of the bundle's precision otherwise.",
)
@click.option(
    "--images", type=click.IntRange(min=1), help="Use this many images, spread evenly over DATA."
)
@click.option(
    "--draw",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write the image each engine does worst on, with both sets of boxes, into this folder.",
)
@threads_option
@json_option
def verify(
    bundle: Path,
    data: str | None,
    engines: tuple[str, ...],
    budget: Path | None,
    images: int | None,
    draw: Path | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Check that BUNDLE finds what torch finds, image by image and box by box.

    ONNX Runtime is judged always, other engines on request. Exit status 3 where one is over the
    budget or there was too little to judge by; the verdict is kept in evidence.json beside the
    artifact.

    Example: detr export verify student.bundle --data kitti:data/kitti:val --engine native
    """
    from export.parity.budget import read_budget
    from export.parity.gate import gate_bundle

    opened = open_bundles(bundle)
    allowed = None if budget is None else read_budget(budget, opened[0].info.precision)
    verdicts = []
    for one in opened:
        place = draw / one.path.stem if draw is not None and len(opened) > 1 else draw
        on = data if len(opened) == 1 or data is None or _shows(data, one) else None
        verdicts.append(gate_bundle(one, on, engines, allowed, images, place, threads))
    _emit_all(opened, verdicts, as_json, (verdict.text() for verdict in verdicts))
    for verdict in verdicts:
        verdict.check()


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Model repository.")
@click.option(
    "--engine",
    metavar="FOLDER",
    help="Folder of a TensorRT engine below the bundle's engines/; by default the one there is, "
    "else the ONNX file.",
)
@click.option(
    "--max-batch",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Largest batch Triton puts together of a bundle with a dynamic batch.",
)
@click.option("--name", default="", help="Of the model; the bundle's name by default.")
@json_option
def triton(
    bundle: Path, out: Path, engine: str | None, max_batch: int, name: str, as_json: bool
) -> None:
    """Add BUNDLE to a model repository of the Triton Inference Server.

    It becomes a new version of its model.

    Writes config.pbtxt (dynamic batching where the batch is dynamic), the labels, a warm-up request
    made of the first golden image, and the version's folder with the model and bundle.json.

    Example: detr export triton student.bundle --out models
    """
    from export.deploy.triton import write_repository
    from export.parity.evidence import refuse_rejected

    opened = open_bundle(bundle)
    refuse_rejected(opened)
    made = write_repository(opened, out, engine, max_batch, name)
    result: dict[str, Any] = {
        "model": str(made.folder), "version": made.version, "backend": made.backend,
        "max_batch": made.max_batch,
    }  # fmt: skip
    batch = f"batches of up to {made.max_batch}" if made.max_batch else "a static batch"
    emit(
        result,
        as_json,
        f"{made.folder}: version {made.version}, backend {made.backend}, {batch}; "
        f"serve with: tritonserver --model-repository {out}",
    )


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Source folder.")
@click.option(
    "--runtime",
    type=click.Choice(["onnxruntime", "tensorrt"]),
    default="onnxruntime",
    show_default=True,
    help="What the sample runs the model with.",
)
@json_option
def cpp(bundle: Path, out: Path, runtime: str, as_json: bool) -> None:
    """Write a small C++17 program that runs BUNDLE: no Python, no OpenCV.

    It reads a PPM or BMP image, prepares it exactly as this package does, runs the model and prints
    what it found. Sizes, classes and normalization are in the generated model_info.hpp.

    Example: detr export cpp student.bundle --out sample --runtime onnxruntime
    """
    from export.deploy.cpp import write_sample
    from export.parity.evidence import refuse_rejected

    opened = open_bundle(bundle)
    refuse_rejected(opened)
    files = write_sample(opened, out, runtime)
    source, build = shlex.quote(str(out)), shlex.quote(str(out / "build"))
    emit(
        {"folder": str(out), "runtime": runtime, "files": [file.name for file in files]},
        as_json,
        f"{out}: {len(files)} files; build with: cmake -S {source} -B {build} && "
        f"cmake --build {build}",
    )
