"""``detr weights``: published weights as checkpoints of ours."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import click
from pydantic import BaseModel

from detr.cli_support import Group, emit, json_option
from detr.data.cli import parse_size
from detr.data.preprocess import PreprocessConfig
from detr.errors import UserError
from detr.model_info import ModelInfo
from detr.models.checkpoint import save_model
from detr.models.describe import parameters
from detr.models.tensors import read_checkpoint
from detr.models.weights import original
from detr.models.weights.classes import class_map, read_classes
from detr.models.weights.hugging_face import read_folder
from detr.models.weights.imported import Imported
from detr.models.weights.licenses import LICENSES
from detr.models.weights.mask_dino import InitialBoxes


class ImportReport(BaseModel):
    """What ``detr weights import`` did.

    Attributes:
        source, out: Where from and where to.
        parameters: Number of parameters of the detector.
        classes: Number of classes; 0 without a class head.
        license: How the family's weights are published.
        notes: What was decided on the way, such as which of two state dicts was read.
        unused: Published tensors that were not needed, with the reason.
    """

    source: str
    out: str
    parameters: int
    classes: int
    license: str
    notes: list[str]
    unused: dict[str, str]

    def text(self) -> str:
        """A few lines for the terminal; every unused tensor is named."""
        lines = [
            f"{self.source} -> {self.out}",
            f"{self.parameters / 1e6:.1f} M parameters, {self.classes} classes",
        ]
        lines.append(f"license: {self.license}; yours is what came with the file")
        lines += [f"note: {note}" for note in self.notes]
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
@click.option(
    "--size",
    help="Canvas HEIGHTxWIDTH that images are fitted to.  [default: the folder's, else short side "
    "800 and long side at most 1333]",
)
@click.option(
    "--ema/--no-ema",
    default=None,
    help="The averaged weights of a .pth that has both, or the others.  [default: its main ones]",
)
@click.option("--dc5", is_flag=True, help="A .pth whose backbone has a dilated last stage.")
@click.option(
    "--discrete", is_flag=True, help="A .pth of RT-DETRv2 or D-FINE with discrete sampling."
)
@click.option(
    "--deim", is_flag=True, help="A .pth of DEIM, whose decoder has SiLU in the place of ReLU."
)
@click.option(
    "--initial-boxes",
    type=click.Choice(get_args(InitialBoxes)),
    help="Anchors of a .pth of Mask DINO: its INITIALIZE_BOX_TYPE, of which no is predicted.  "
    "[default: the published configs']",
)
@json_option
def import_(
    source: Path,
    out: Path,
    classes: Path | None,
    size: str | None,
    ema: bool | None,
    dc5: bool,
    discrete: bool,
    deim: bool,
    initial_boxes: InitialBoxes | None,
    as_json: bool,
) -> None:
    """Read published weights into a checkpoint.

    SOURCE is a Hugging Face folder (config.json and weights) of DETR, Conditional DETR, DAB-DETR,
    Deformable DETR, RT-DETR(v2), D-FINE, DEIMv2, LW-DETR or RF-DETR, or a .pth of the original
    DETR, Conditional-DETR, DAB-DETR, Deformable-DETR, DN-DETR, H-Deformable-DETR, DINO,
    Stable-DINO, MaskDINO, RT-DETR(v2), D-FINE, DEIM(v2), LW-DETR or RF-DETR repository, or of most
    of these in detrex or mmdet. Pickles are read for their tensors only; code in them never runs.

    Every published tensor is used or listed, and every tensor of ours is filled, or it is an error.

    Example: detr weights import detr-resnet-50 --out runs/detr.safetensors
    """
    canvas = None if size is None else parse_size(size)
    if source.is_dir():
        given_options = {
            "--ema": ema is not None,
            "--dc5": dc5,
            "--discrete": discrete,
            "--deim": deim,
            "--initial-boxes": initial_boxes is not None,
        }
        for option, given in given_options.items():
            if given:
                raise UserError("weights-option", f"{source}: {option} is for a .pth, not a folder")
        found = read_folder(source, canvas)
    else:
        found = _read_file(source, canvas, ema, dc5, discrete, deim, initial_boxes)
    config = found.detector.config
    if found.without and classes is not None:
        raise UserError(
            "weights-option", f"{source}: has no class head, so there is nothing for --classes"
        )
    info = ModelInfo(
        detector=config,
        classes=class_map(found.names)
        if classes is None
        else read_classes(classes, config.num_classes),
        preprocess=found.preprocess,
        provenance={"imported_from": str(source)},
    )
    save_model(out, found.detector, info, without=found.without)
    report = ImportReport(
        source=str(source),
        out=str(out),
        parameters=parameters(found.detector)["total"],
        classes=0 if found.without else config.num_classes,
        license=str(LICENSES[found.family]),
        notes=list(found.notes),
        unused=found.unused,
    )
    emit(report, as_json, report.text())


def _read_file(
    source: Path,
    canvas: tuple[int, int] | None,
    averaged: bool | None,
    dilated: bool,
    discrete: bool,
    deim: bool,
    initial_boxes: InitialBoxes | None,
) -> Imported:
    """The detector of a training's file."""
    checkpoint = read_checkpoint(source, averaged)
    found = original.convert(
        checkpoint.tensors, str(source), checkpoint.options, dilated, discrete, deim, initial_boxes
    )
    notes = (checkpoint.note, *found.notes) if checkpoint.note else found.notes
    if checkpoint.names and len(checkpoint.names) == len(found.names) and not found.without:
        found = found._replace(names=checkpoint.names)
    elif checkpoint.names:
        notes += (f"the file's {len(checkpoint.names)} class names are not those of the detector",)
    preprocess = found.preprocess
    if canvas is not None:
        preprocess = PreprocessConfig(size=canvas, mean=preprocess.mean, std=preprocess.std)
    return found._replace(notes=notes, preprocess=preprocess)
