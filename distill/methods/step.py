"""Everything a distillation method may look at in one training step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from detr.models import Detector, GroupOutput, Memory, QueryGroup, Target, Teacher

T = TypeVar("T")

# Of a method: the recipe's teacher, the running average of the student, or nobody.
TeacherKind = Literal["none", "frozen", "ema"]


@dataclass(eq=False)
class Step:
    """State of one training step; filled by ``distill.training.loop`` in the order of the fields.

    Attributes:
        index: Training step, counted from 0.
        images: ``[B, 3, H, W]`` normalized, padded images, the same for student and teacher.
        valid_sizes: ``[B, 2]`` valid (height, width) of each image in pixels.
        targets: Ground truth per image, boxes relative to the image without its padding.
        student: The network being trained.
        teacher: The frozen network, in evaluation mode, or None.
        student_memory: Output of the student's encoder.
        teacher_memory: Output of the teacher's encoder (no gradient), or None.
        student_groups: The student's own and denoising queries, before methods add theirs.
        teacher_groups: The teacher's own queries.
        student_outputs: Decoded groups by role; filled after the decoder call.
        teacher_outputs: The teacher's decoded groups by role (no gradient).
        beside: The same step with another teacher, where methods learn from several; what is the
            student's is shared.
        normalizer: Scalar, max(1, ground-truth boxes of all processes) / number of processes.
        generator: On the CPU, for random choices that are the same for all images of all
            processes; a function of (seed, step).
        generators: On the CPU, one per image, for choices of its own; functions of (seed, step,
            place of the image among those of all processes).
    """

    index: int
    images: Tensor
    valid_sizes: Tensor
    targets: list[Target]
    student: Detector
    teacher: Teacher | None
    student_memory: Memory
    teacher_memory: Memory | None
    student_groups: list[QueryGroup]
    teacher_groups: list[QueryGroup]
    normalizer: Tensor
    generator: torch.Generator
    generators: list[torch.Generator]
    student_outputs: dict[str, GroupOutput] = field(default_factory=dict)
    teacher_outputs: dict[str, GroupOutput] = field(default_factory=dict)
    beside: dict[TeacherKind, Step] = field(default_factory=dict)

    def towards(self, kind: TeacherKind) -> Step:
        """The step as a method sees it that learns from such a teacher."""
        return self.beside.get(kind, self)


class PerStep(Generic[T]):
    """What a method computes once in a step, whichever of its questions needs it first.

    A method makes it in its constructor and calls it with the step; what was computed is kept as
    long as the step lives::

        self.teacher_matches = PerStep(self._match_teacher)  # PerStep[Matches]
        ...
        matches = self.teacher_matches(step)

    Args:
        compute: Makes it from a step in which everything it reads has been filled in.
    """

    def __init__(self, compute: Callable[[Step], T]) -> None:
        self._compute = compute
        self._values: WeakKeyDictionary[Step, T] = WeakKeyDictionary()

    def __call__(self, step: Step) -> T:
        """The step's value."""
        if step not in self._values:
            self._values[step] = self._compute(step)
        return self._values[step]


@dataclass
class PairedGroup:
    """Extra queries a method wants decoded by the student, the teacher or both.

    Both sides carry the same role name, under which their outputs appear in the step.
    """

    role: str
    student: QueryGroup | None
    teacher: QueryGroup | None
