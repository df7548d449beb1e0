"""A shallower detector out of some of a detector's layers, as a student's starting point."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from detr.errors import UserError
from detr.model_info import ModelInfo
from detr.models.checkpoint import load_model, save_model
from detr.models.detector import Detector, build_detector
from detr.models.inherit import inherit
from detr.models.share import query_tables
from detr.shipped import find_model


def extract_layers(
    teacher: Detector,
    encoder: Sequence[int] | None = None,
    decoder: Sequence[int] | None = None,
    queries: int | None = None,
) -> Detector:
    """A detector of the layers named, with every weight the teacher's.

    Heads follow the decoder's layers; backbone, neck and denoising are taken whole, and of the
    queries the first: where the encoder proposes them, the best.

    Args:
        teacher: Read only.
        encoder: Its encoder layers (from 0) that are kept, in ascending order; all by default.
        decoder: The same for the decoder, at least one.
        queries: How many it keeps; all by default.

    Raises:
        UserError: ``extract-layer-map`` for layers that the teacher does not have or that are out
            of order, ``extract-queries`` for a number of queries it does not have,
            ``extract-impossible`` where what remains is no detector of the same kind.
    """
    config = teacher.config
    kept = {
        "encoder": _checked(encoder, config.encoder.layers, "encoder"),
        "decoder": _checked(decoder, config.decoder.layers, "decoder"),
    }
    if not kept["decoder"]:
        raise UserError("extract-layer-map", "decoder: a detector needs at least one decoder layer")
    fewer = len(kept["encoder"]) < config.encoder.layers
    if fewer and config.encoder.fuses_every_layer:
        raise UserError(
            "extract-impossible",
            f"encoder: its fusion joins all {config.encoder.layers} layers of the teacher; "
            "keep them all",
        )
    cross = config.decoder.cross_attention
    if cross.first_layer_differs and kept["decoder"][0] != 0:
        raise UserError(
            "extract-impossible",
            f"decoder: a {cross.kind} decoder's layer 0 alone reads positions; start with it",
        )
    has = config.queries.number
    if queries is not None and not 1 <= queries <= has:
        raise UserError(
            "extract-queries", f"queries: {queries} of the teacher's {has}; keep 1 to {has}"
        )
    changes: dict[str, dict[str, Any]] = {
        part: {"layers": len(layers)} for part, layers in kept.items()
    }
    changes["queries"] = {"number": queries or has}
    # Of the layers that are left all answer, whichever answered before.
    changes["decoder"]["evaluated_layers"] = None
    try:
        smaller = config.replace(**changes)
    except ValidationError as error:
        raise UserError("extract-impossible", error.errors()[0]["msg"]) from error
    student = build_detector(smaller, pretrained=False)
    report = inherit(student, teacher, kept["encoder"], kept["decoder"])
    cut = _cut_tables(student, teacher)
    assert not report.skipped.keys() - cut, report.skipped
    return student.train(teacher.training)


def extract_file(
    source: Path,
    out: Path,
    encoder: Sequence[int] | None = None,
    decoder: Sequence[int] | None = None,
    queries: int | None = None,
    size: tuple[int, int] | None = None,
) -> ModelInfo:
    """Writes the model of some of a checkpoint's layers and queries, perhaps for another canvas.

    Args:
        source: Weights file, run directory or name of a shipped model.
        out: ``X.safetensors``.
        encoder: See :func:`extract_layers`.
        decoder: Likewise.
        queries: Likewise.
        size: Canvas (height, width); the checkpoint's by default.

    Returns:
        Its sidecar; what the checkpoint's said of measurements is not in it.

    Raises:
        UserError: What :func:`extract_layers` and reading the checkpoint raise, and ``size-form``
            for a canvas that is none.
    """
    whole, info = load_model(find_model(source))
    model = extract_layers(whole, encoder, decoder, queries)
    preprocess = info.preprocess
    if size is not None:
        try:
            preprocess = preprocess.replace(size=size)
        except ValidationError as error:
            told = f"{size[0]}x{size[1]} is no canvas: {error.errors()[0]['msg']}"
            raise UserError("size-form", told) from error
    # What was measured was measured with all layers.
    facts = {k: v for k, v in info.provenance.items() if not k.startswith("ap")}
    config = model.config
    kept = {
        "encoder": list(range(config.encoder.layers)) if encoder is None else list(encoder),
        "decoder": list(range(config.decoder.layers)) if decoder is None else list(decoder),
        "queries": config.queries.number,
    }
    facts["extracted"] = {"from": str(source), **kept}
    changed = {"detector": config, "preprocess": preprocess, "provenance": facts}
    cut = info.model_copy(update=changed)
    save_model(out, model, cut)
    return cut


@torch.no_grad()
def _cut_tables(student: Detector, teacher: Detector) -> set[str]:
    """Copies the first rows of tables that have one for each query; names of their tensors."""
    longer = query_tables(teacher)
    cut = set()
    for name, table in query_tables(student).items():
        if len(table.weight) < len(longer[name].weight):
            table.weight.copy_(longer[name].weight[: len(table.weight)])
            cut.add(f"source.{name}.weight")
    return cut


def _checked(layers: Sequence[int] | None, depth: int, part: str) -> tuple[int, ...]:
    """A valid choice of layers."""
    if layers is None:
        return tuple(range(depth))
    for layer in layers:
        if not 0 <= layer < depth:
            has = f"layers 0 to {depth - 1}" if depth else "none"
            raise UserError(
                "extract-layer-map", f"{part}: the teacher has no layer {layer}, only {has}"
            )
    if list(layers) != sorted(set(layers)):
        raise UserError(
            "extract-layer-map",
            f"{part}: {','.join(map(str, layers))}: name each layer once, in ascending order",
        )
    return tuple(layers)
