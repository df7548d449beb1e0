"""``detr weights``: published weights as checkpoints of ours."""

from __future__ import annotations

from pathlib import Path

import click
from pydantic import BaseModel

from detr.cli_support import Group, emit, json_option
from detr.data.cli import parse_size
from detr.errors import UserError
from detr.model_info import ModelInfo
from detr.models.checkpoint import save_model
from detr.models.describe import parameters
from detr.models.tensors import read_checkpoint
from detr.models.weights import original
from detr.models.weights.classes import class_map, read_classes
from detr.models.weights.hugging_face import read_folder


class ImportReport(BaseModel):
    """What ``detr weights import`` did.

    Attributes:
        source, out: Where from and where to.
        parameters: Number of parameters of the detector.
        classes: Number of classes.
        unused: Published tensors that were not needed, with the reason.
    """

    source: str
    out: str
    parameters: int
    classes: int
    unused: dict[str, str]

    def text(self) -> str:
        """A few lines for the terminal; every unused tensor is named."""
        lines = [
            f"{self.source} -> {self.out}",
            f"{self.parameters / 1e6:.1f} M parameters, {self.classes} classes",
        ]
        lines += [f"not needed: {name} ({reason})" for name, reason in self.unused.items()]
        return "\n".join(lines)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
def weights() -> None:
    """Use published weights."""


@weights.command("import")
@click.argument("source", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="The .safetensors to write."
)
@click.option(
    "--classes",
    type=click.Path(path_type=Path),
    help="JSON with names and category_ids, or a COCO annotation file.",
)
@click.option("--size", help="Canvas HEIGHTxWIDTH.  [default: 800x1333; RT-DETR 640x640]")
@click.option("--dc5", is_flag=True, help="A .pth whose backbone has a dilated last stage.")
@click.option("--discrete", is_flag=True, help="A .pth of RT-DETRv2 with discrete sampling.")
@json_option
def import_(
    source: Path,
    out: Path,
    classes: Path | None,
    size: str | None,
    dc5: bool,
    discrete: bool,
    as_json: bool,
) -> None:
    """Read published weights into a checkpoint.

    SOURCE is a Hugging Face folder (config.json and safetensors) of DETR, Conditional DETR,
    DAB-DETR, Deformable DETR or RT-DETR(v2), or a .pth of the original DETR, Conditional-DETR,
    DAB-DETR, Deformable-DETR, DN-DETR, H-Deformable-DETR, DINO or RT-DETR repository, or of
    detrex's DINO. Pickles are read for their tensors only; code in them never runs.

    Every published tensor is used or listed, and every tensor of ours is filled, or it is an error.

    Example: detr weights import detr-resnet-50 --out runs/detr.safetensors
    """
    canvas = None if size is None else parse_size(size)
    if source.is_dir() and discrete:
        raise UserError(
            "weights-config", f"{source}: its config.json says how it samples; leave out --discrete"
        )
    if source.is_dir():
        imported = read_folder(source)
    else:
        checkpoint = read_checkpoint(source)
        imported = original.convert(
            checkpoint.tensors, str(source), checkpoint.options, dc5, discrete
        )
    config = imported.detector.config
    info = ModelInfo(
        detector=config,
        classes=class_map(imported.names)
        if classes is None
        else read_classes(classes, config.num_classes),
        preprocess=imported.preprocess
        if canvas is None
        else imported.preprocess.replace(size=canvas),
        provenance={"imported_from": str(source)},
    )
    save_model(out, imported.detector, info)
    report = ImportReport(
        source=str(source),
        out=str(out),
        parameters=parameters(imported.detector)["total"],
        classes=config.num_classes,
        unused=imported.unused,
    )
    emit(report, as_json, report.text())
