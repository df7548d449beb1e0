"""From an ONNX file that nobody here exported to a bundle that answers like it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from onnx import ModelProto, shape_inference

from detr.cli_support import progress
from detr.config import ClassMap
from detr.data.preprocess import PreprocessConfig
from detr.errors import UserError
from detr.files import output_folder
from detr.model_info import AdoptedInfo
from detr.models.weights.classes import fit_classes
from detr.types import ImageArray
from engines.bundle import Bundle, open_bundle
from engines.msda_function import HeadShape, Lowering, set_lowering
from export.adopt.contract import (
    QueryOutputs,
    Reading,
    ReadyOutputs,
    ScoredRows,
    Scores,
    Signature,
    reading,
    signature,
    wrapped,
)
from export.adopt.fold import Fold, Folded, fold_attention
from export.adopt.original import OriginalEngine
from export.adopt.prepare import constants_apart, load, static, to_known_opset
from export.bundle import refuse_output, write_bundle
from export.golden import drawn_images
from export.precision.apply import PrecisionRequest

_BOX = 4  # columns of a row before those of the classes


@dataclass(frozen=True)
class Adopted:
    """What came of an adoption.

    Attributes:
        bundle: The bundle, accepted by the gate.
        folds: The attentions that became nodes.
        left: Sums of samples that stayed as they were, each with the reason.
        reading: How its outputs are read.
    """

    bundle: Bundle
    folds: tuple[Fold, ...]
    left: tuple[str, ...]
    reading: Reading


def adopt(
    path: Path,
    out: Path,
    classes: ClassMap,
    preprocess: PreprocessConfig,
    scores: Scores | None = None,
    detections: int | None = None,
    lowering: Lowering = "gridsample",
    images: Sequence[ImageArray] | None = None,
    request: PrecisionRequest | None = None,
) -> Adopted:
    """Makes a bundle of a detector's ONNX file.

    Deformable attention that is written as GridSample becomes our node; the inputs and outputs
    become the bundle's. The detections of the untouched file on a few images are kept in it as
    golden ones, and the gate compares ONNX Runtime on the new graph with them.

    Args:
        path: The file; it is left as it is. Graphs are taken for one image.
        out: The bundle's folder.
        classes: In the order of the file's class outputs, or fewer, each at the output of its
            category id.
        preprocess: With a canvas; what the file wants its images to go through.
        scores: How class outputs become scores, where their number does not say it.
        detections: How many are kept of an image, by default one per query.
        lowering: Body of the attention function for runtimes without our kernel.
        images: Golden images; drawn ones where ``None``.
        request: Precision of the graph, float32 by default.

    Raises:
        RejectedExport: See :func:`export.bundle.export_bundle`.
        UserError: ``adopt-unreadable``, ``adopt-input``, ``adopt-output``, ``adopt-scores``,
            ``adopt-opset``, ``adopt-unrunnable``, and what writing raises.
    """
    refuse_output(out)
    canvas = preprocess.canvases[0]
    with progress(range(3), f"adopt {path.name}", 3) as bar:
        bar.set_postfix_str("reading the graph")
        model = load(path)
        known = signature(model, str(path))
        shapes = {known.image: (1, 3, *canvas)} | (
            {} if known.size is None else {known.size: (1, 2)}
        )
        prepared = shape_inference.infer_shapes(
            static(to_known_opset(model, path), shapes, path), data_prop=True
        )
        classes, read = _reading(prepared, known, classes, scores, detections, str(path))
        bar.set_postfix_str("looking for deformable attention")
        folded = _with_one_function(fold_attention(prepared), prepared)
        graph = wrapped(folded.model, known, read, canvas)
        head = folded.folds[0].head if folded.folds else None
        if head is not None:
            set_lowering(graph, head, lowering)
        # Typing a graph and building an engine ask for the type of every value.
        graph = shape_inference.infer_shapes(constants_apart(graph), data_prop=True)
        info = AdoptedInfo(
            classes=classes,
            preprocess=preprocess,
            attention=None if head is None else (head.heads, head.channels, head.points),
            detections=read.detections,
            provenance={
                "adopted_from": path.name,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "scores": read.scores,
                "attentions": len(folded.folds),
                "left": list(folded.left),
            },
        )
        bar.update()
        original = OriginalEngine(path, info, known, read)
        output_folder(out.parent)
        opset = next(entry.version for entry in graph.opset_import if entry.domain == "")
        write_bundle(
            graph,
            original,
            out,
            opset,
            1,
            lowering,
            list(images) if images is not None else drawn_images(canvas),
            request,
            True,
            bar,
        )
    return Adopted(open_bundle(out), folded.folds, folded.left, read)


def _reading(
    model: ModelProto,
    known: Signature,
    classes: ClassMap,
    scores: Scores | None,
    detections: int | None,
    place: str,
) -> tuple[ClassMap, Reading]:
    """A name for each class output of the static graph, and how its outputs are read."""
    sizes = {
        value.name: [d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in model.graph.output
    }
    given = known.outputs
    if isinstance(given, QueryOutputs | ScoredRows):
        name, more = (given.logits, 0) if isinstance(given, QueryOutputs) else (given.rows, _BOX)
        _, queries, outputs = sizes[name]
        outputs -= more
        if not queries or outputs < 1:
            raise UserError("adopt-output", f"{place}: {name}: of unknown size")
        if scores == "softmax" and more:
            raise UserError("adopt-scores", f"{place}: --scores softmax: they are by sigmoid")
        if len(classes) not in (outputs, outputs - 1):
            classes = fit_classes(classes, outputs - (scores == "softmax"), place)
        return classes, reading(outputs, queries, len(classes), scores, detections, place)
    if scores is not None:
        raise UserError("adopt-scores", f"{place}: gives scores; --scores is for class logits")
    name = given.scores if isinstance(given, ReadyOutputs) else given.rows
    count = sizes[name][1]
    if not count:
        raise UserError("adopt-output", f"{place}: {name}: of unknown size")
    return classes, Reading("sigmoid", len(classes), min(detections or count, count))


def _with_one_function(folded: Folded, before: ModelProto) -> Folded:
    """A graph has one body for all its attentions, so all must be of one size."""
    kinds: set[tuple[tuple[tuple[int, int], ...], HeadShape]] = {
        (fold.shapes, fold.head) for fold in folded.folds
    }
    if len(kinds) < 2:
        return folded
    told = f"{len(folded.folds)} attentions of {len(kinds)} different sizes, which no node is for"
    return Folded(before, (), (*folded.left, told))
