"""``export verify``: the parity gate as a command."""

from __future__ import annotations

from pathlib import Path

import click

from detr.cli_support import emit, json_option


@click.command()
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
@json_option
def verify(
    bundle: Path,
    data: str | None,
    engines: tuple[str, ...],
    budget: Path | None,
    images: int | None,
    draw: Path | None,
    as_json: bool,
) -> None:
    """Check that BUNDLE finds what torch finds, image by image and box by box.

    ONNX Runtime is judged always, other engines on request. Exit status 3 where one is over the
    budget or there was too little to judge by; the verdict is kept in evidence.json beside the
    artefact.

    Example: detr export verify student.bundle --data kitti:data/kitti:val --engine native
    """
    from engines.bundle import open_bundle
    from export.budget import read_budget
    from export.verify import verify as judge_bundle

    opened = open_bundle(bundle)
    allowed = None if budget is None else read_budget(budget, opened.info.precision)
    verdict = judge_bundle(opened, data, engines, allowed, images, draw)
    emit(verdict, as_json, verdict.text())
    verdict.check()
