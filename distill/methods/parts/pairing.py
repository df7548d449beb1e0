"""Which layers and feature levels of a student and a teacher belong together."""

from __future__ import annotations

import torch
from torch import Tensor

from detr.errors import UserError
from detr.models import Detector, Memory

LayerMap = tuple[int | None, ...]
Pairs = tuple[tuple[int, int], ...]


def pair_layers(student: int, teacher: int, layer_map: LayerMap | None, method: str) -> Pairs:
    """(student, teacher) decoder layers to compare.

    Without a map, layers of equally deep decoders are paired one to one; of decoders of different
    depth only the last layers are (CLoCKDistill section 4.5.2).

    Args:
        student: Number of the student's layers.
        teacher: Number of the teacher's layers.
        layer_map: Teacher layer (from 0) for each student layer, ``None`` for a layer without.
        method: Name of the asking method, for messages.

    Raises:
        UserError: ``method-layer-map`` where the map does not fit the depths.
    """
    if layer_map is None:
        if student == teacher:
            return tuple((i, i) for i in range(student))
        return ((student - 1, teacher - 1),)
    if len(layer_map) != student:
        raise UserError(
            "method-layer-map",
            f"methods.{method}.layer_map: {len(layer_map)} entries for {student} student layers",
        )
    for i, layer in enumerate(layer_map):
        if layer is not None and not 0 <= layer < teacher:
            raise UserError(
                "method-layer-map",
                f"methods.{method}.layer_map[{i}]: the teacher has no layer {layer} "
                f"(0 to {teacher - 1})",
            )
    return tuple((i, layer) for i, layer in enumerate(layer_map) if layer is not None)


def pair_decoders(
    student: Detector, teacher: Detector, layer_map: LayerMap | None, method: str
) -> Pairs:
    """:func:`pair_layers` of two models."""
    ours, theirs = student.config.decoder.layers, teacher.config.decoder.layers
    return pair_layers(ours, theirs, layer_map, method)


def pair_levels(student: Detector, teacher: Detector, method: str) -> Pairs:
    """(student, teacher) indices of the feature levels both models have: those of equal stride.

    Raises:
        UserError: ``method-levels`` where they share no stride.
    """
    pairs = tuple(
        (i, teacher.strides.index(stride))
        for i, stride in enumerate(student.strides)
        if stride in teacher.strides
    )
    if not pairs:
        raise UserError(
            "method-levels",
            f"methods.{method}: student (strides {list(student.strides)}) and teacher "
            f"({list(teacher.strides)}) share no feature level",
        )
    return pairs


def split_levels(tokens: Tensor, memory: Memory) -> list[Tensor]:
    """``[B, S, ...]`` tokens as one ``[B, H*W, ...]`` view per level of the memory."""
    return list(torch.split(tokens, [h * w for h, w in memory.shapes], dim=1))
