"""Pairs of student and teacher feature maps, for methods that imitate maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from detr.errors import UserError
from detr.models import Facts, Memory
from distill.methods.base import float32
from distill.methods.parts.pairing import pair_levels, split_levels
from distill.methods.step import Step

Place = Literal["backbone", "neck", "memory"]


@dataclass
class MapPair:
    """One level, float32.

    Attributes:
        student: ``[B, C, H, W]``, already in the teacher's number of channels.
        teacher: ``[B, C, H, W]`` without gradient.
        valid: ``[B, 1, H, W]`` bool, false in the padding.
    """

    student: Tensor
    teacher: Tensor
    valid: Tensor


class FeaturePairs(nn.Module):
    """Takes the maps out of a step and brings the student's to the teacher's channels.

    Args:
        place: ``backbone`` maps, ``neck`` (what enters the encoder) or ``memory`` (what leaves it).
        student: Of the network to be trained.
        teacher: Of the frozen network.
        method: Name of the asking method, for messages.

    Attributes:
        channels: Of each pair.

    Raises:
        UserError: ``method-levels`` where the models share no level there.
    """

    def __init__(self, place: Place, student: Facts, teacher: Facts, method: str) -> None:
        super().__init__()
        self.place = place
        count = (len(student.backbone_strides), len(teacher.backbone_strides))
        self.levels = pair_levels(student, teacher, method)
        if place == "backbone":
            # Backbone maps are the leading levels; the others exist behind the neck only.
            self.levels = tuple((s, t) for s, t in self.levels if s < count[0] and t < count[1])
            if not self.levels:
                raise UserError(
                    "method-levels",
                    f"methods.{method}: student (strides {list(student.backbone_strides)}) "
                    f"and teacher ({list(teacher.backbone_strides)}) share no backbone map",
                )
        ours, theirs = _channels(student, place), _channels(teacher, place)
        self.channels = tuple(theirs[t] for _, t in self.levels)
        self.align = nn.ModuleList(
            nn.Identity() if ours[s] == theirs[t] else nn.Conv2d(ours[s], theirs[t], 1)
            for s, t in self.levels
        )

    def forward(self, step: Step) -> list[MapPair]:
        """One pair per level both models have, finest first."""
        assert step.teacher_memory is not None
        ours, theirs = (
            _maps(step.student_memory, self.place),
            _maps(step.teacher_memory, self.place),
        )
        padding = split_levels(step.student_memory.padding, step.student_memory)
        pairs = []
        for (s, t), align in zip(self.levels, self.align, strict=True):
            student = float32(align(ours[s]))
            height, width = student.shape[-2:]
            valid = ~padding[s].reshape(-1, 1, height, width)
            pairs.append(MapPair(student, float32(theirs[t]).detach(), valid))
        return pairs

    def indices(self) -> list[int]:
        """Student level of each pair."""
        return [s for s, _ in self.levels]


def _channels(facts: Facts, place: Place) -> tuple[int, ...]:
    if place == "backbone":
        return facts.backbone_channels
    width = facts.width if place == "memory" else facts.neck_width
    return (width,) * len(facts.strides)


def _maps(memory: Memory, place: Place) -> list[Tensor]:
    """``[B, C, H, W]`` per level."""
    if place == "backbone":
        return memory.features
    tokens = memory.tokens if place == "memory" else memory.layers[0]
    return [
        level.transpose(1, 2).reshape(len(level), -1, *shape)
        for level, shape in zip(split_levels(tokens, memory), memory.shapes, strict=True)
    ]
