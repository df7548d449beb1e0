"""A detector starts from the weights of another one: fine-tuning.

Depth, number of queries, canvas and classes may differ; what agrees in name and shape is taken, and
rows of classes by the classes' names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from detr.config import ClassMap
from detr.errors import UserError
from detr.model_info import ModelInfo, read_model_info
from detr.models.checkpoint import weights_file
from detr.models.class_names import listed, match_classes
from detr.models.detector import Detector
from detr.models.tensors import read_tensors, refuse_nonfinite
from detr.models.transfer import Source, TransferReport, transfer


def start(
    detector: Detector, path: Path, classes: ClassMap, renamed: Mapping[str, str]
) -> tuple[TransferReport, ModelInfo]:
    """Copies the weights of a checkpoint into a detector.

    What is taken, :func:`detr.models.transfer.transfer` says. The checkpoint need not be complete:
    a class head may have been cut off.

    Args:
        detector: Changed in place.
        path: Run directory or weights with their sidecar.
        classes: Of the detector.
        renamed: The checkpoint's names of those classes that have another name there.

    Returns:
        What was taken, and the checkpoint's sidecar.

    Raises:
        UserError: ``start-classes`` for a renamed class that the data or the checkpoint does not
            have, ``start-nothing`` where no tensor agrees, and what reading the file raises.
    """
    file = weights_file(path)
    tensors = read_tensors(file)
    refuse_nonfinite(tensors, str(file))
    info = read_model_info(file.with_suffix(".json"))
    names = info.classes.names
    match = match_classes(classes.names, names, renamed)
    if match.strange:
        raise UserError("start-classes", f"start_classes: the data has no {listed(match.strange)}")
    if match.lost:
        raise UserError(
            "start-classes",
            f"start_classes: {path} does not know {listed(match.lost)}; it knows {listed(names)}",
        )
    report = transfer(detector, Source("start", info.detector, tensors), columns=match.columns)
    if not report.inherited:
        raise UserError(
            "start-nothing",
            f"start: no tensor of the detector has the shape of one of {path} "
            f"(width {detector.config.width} and {info.detector.width})",
        )
    return report, info
