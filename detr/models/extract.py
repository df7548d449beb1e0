"""A shallower detector out of some of a detector's layers, as a student's starting point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from detr.errors import UserError
from detr.models.detector import Detector, build_detector
from detr.models.inherit import inherit


def extract_layers(
    teacher: Detector, encoder: Sequence[int] | None = None, decoder: Sequence[int] | None = None
) -> Detector:
    """A detector of the layers named, with every weight the teacher's.

    Heads follow the decoder's layers; backbone, neck, queries and denoising are taken whole.

    Args:
        teacher: Read only.
        encoder: Its encoder layers (from 0) that are kept, in ascending order; all by default.
        decoder: The same for the decoder, at least one.

    Raises:
        UserError: ``extract-layer-map`` for layers that the teacher does not have or that are out
            of order, ``extract-impossible`` where what remains is no detector of the same kind.
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
    depths: dict[str, dict[str, Any]] = {
        part: {"layers": len(layers)} for part, layers in kept.items()
    }
    # Of the layers that are left all answer, whichever answered before.
    depths["decoder"]["evaluated_layers"] = None
    try:
        smaller = config.replace(**depths)
    except ValidationError as error:
        raise UserError("extract-impossible", error.errors()[0]["msg"]) from error
    student = build_detector(smaller, pretrained=False)
    report = inherit(student, teacher, kept["encoder"], kept["decoder"])
    assert not report.skipped, report.skipped
    return student.train(teacher.training)


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
