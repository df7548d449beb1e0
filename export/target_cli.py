"""``detr export`` for what runs a bundle without this package: Triton and C++."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from detr.cli_support import emit, json_option
from engines.bundle import open_bundle


@click.command()
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
    """Add BUNDLE to a Triton Inference Server model repository, as a new version of its model.

    Writes config.pbtxt (dynamic batching where the batch is dynamic), the labels, a warm-up request
    made of the first golden image, and the version's folder with the model and bundle.json.

    Example: detr export triton student.bundle --out models
    """
    from export.record import refuse_rejected
    from export.triton import write_repository

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


@click.command()
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
    what it found. Sizes, classes and normalisation are in the generated model_info.hpp.

    Example: detr export cpp student.bundle --out sample --runtime onnxruntime
    """
    from export.cpp import write_sample
    from export.record import refuse_rejected

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
