"""What student and teacher say to a batch, and the losses over it.

One student is asked by :func:`forward`; :mod:`distill.elastic.step` asks several of a batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from detr.errors import UserError
from detr.models import Detector, GroupOutput, Memory, QueryGroup, Teacher
from distill.data.batches import Batch
from distill.losses.detection import detection_losses
from distill.losses.weights import LossWeights
from distill.methods import Method
from distill.methods.step import Step, TeacherKind
from distill.profiler import span
from distill.training.accumulate import Share
from distill.training.state import State


@dataclass(frozen=True)
class Seen:
    """A teacher, and what it sees of a batch; without gradient.

    Attributes:
        teacher: In evaluation mode.
        memory: Of its encoder.
        groups: Its own queries.
    """

    teacher: Teacher
    memory: Memory
    groups: list[QueryGroup]
    _own: dict[tuple[bool, frozenset[str]], list[GroupOutput]] = field(default_factory=dict)

    def answers(
        self, asked: list[QueryGroup], attention: bool, maps: frozenset[str]
    ) -> list[GroupOutput]:
        """Its answers to its own queries and to further ones; to its own alone it thinks once.

        Args:
            asked: Queries of methods.
            attention: See :meth:`Teacher.decode`.
            maps: Roles whose self-attention is wanted.
        """
        with torch.no_grad(), span("teacher_decoder"):
            if asked:
                return self.teacher.decode(self.memory, self.groups + asked, attention, maps)
            if (attention, maps) not in self._own:
                outputs = self.teacher.decode(self.memory, self.groups, attention, maps)
                self._own[attention, maps] = outputs
            return self._own[attention, maps]


@dataclass(frozen=True)
class Answered:
    """A student's step, and the methods that asked."""

    step: Step
    methods: Sequence[Method[Any]]


# What looks at images, or at a part of them: who answered, and the losses, which are summed.
Look = Callable[[Batch, Share], tuple[list[Answered], dict[str, Tensor]]]


@dataclass(frozen=True)
class Pass:
    """Images of a step, and what looks at them."""

    batch: Batch
    look: Look


def whole(state: State, batch: Batch, index: int) -> Pass:
    """A step's one pass over its images where one student is trained.

    Args:
        state: Of the run.
        batch: On the device.
        index: The step, from 0.
    """

    def look_at(part: Batch, share: Share) -> tuple[list[Answered], dict[str, Tensor]]:
        step = forward(state, part, index, share)
        with span("losses"):
            losses = losses_of(step, state.methods, state.recipe.loss)
        return [Answered(step, state.methods)], losses

    return Pass(batch, look_at)


def forward(state: State, batch: Batch, index: int, share: Share | None = None) -> Step:
    """Encodes and decodes a batch with student and teacher, all query groups in one call each.

    Args:
        state: Of the run.
        batch: On the device.
        index: The step, from 0.
        share: What a part of a step must know of the whole.
    """
    if share is None:
        share = Share(*state.box_counts(batch.targets), *state.generators(index))
    with state.autocast():
        with span("student"):
            memory = state.student.encode(batch.images, batch.valid_sizes)
        seen = {kind: look(teacher, batch) for kind, teacher in state.teachers.items()}
        return answer(state.student, memory, seen, state.methods, batch, index, share)


def look(teacher: Teacher, batch: Batch) -> Seen:
    """What a teacher sees of a batch."""
    with torch.no_grad(), span("teacher"):
        memory = teacher.encode(batch.images, batch.valid_sizes)
        return Seen(teacher, memory, teacher.queries(memory))


def answer(
    student: Detector,
    memory: Memory,
    seen: Mapping[TeacherKind, Seen],
    methods: Sequence[Method[Any]],
    batch: Batch,
    index: int,
    share: Share,
) -> Step:
    """Decodes a batch that was encoded, with what the methods ask of student and teacher.

    Args:
        student: In training mode.
        memory: Of the student.
        seen: What teachers see, by the kind of those who learn from them.
        methods: Whose questions are asked.
        batch: On the device.
        index: The step, from 0.
        share: What a part of a step must know of the whole.
    """
    with span("student"):
        groups = student.queries(memory, batch.targets, share.generators, share.most)
    step = Step(
        index=index,
        images=batch.images,
        valid_sizes=batch.valid_sizes,
        targets=batch.targets,
        student=student,
        teacher=None,
        student_memory=memory,
        teacher_memory=None,
        student_groups=groups,
        teacher_groups=[],
        normalizer=share.normalizer,
        generator=share.generator,
        generators=share.generators,
    )
    step = _beside(step, seen)
    extra: list[QueryGroup] = []
    asking: dict[Step, list[Method[Any]]] = defaultdict(list)
    asked: dict[Step, list[QueryGroup]] = defaultdict(list)
    with span("queries"):
        for method in methods:
            own = step.towards(method.teacher)
            asking[own].append(method)
            for pair in method.groups(own):
                extra += [] if pair.student is None else [pair.student]
                asked[own] += [] if pair.teacher is None else [pair.teacher]
    for kind, teacher in seen.items():
        own = step.towards(kind)
        _check_answerable(asked[own], teacher.teacher)
        outputs = teacher.answers(asked[own], *_wanted(asking[own]))
        own.teacher_outputs.update({output.group.role: output for output in outputs})
    with span("queries"):
        groups = step.student_groups + extra
        for method in methods:
            groups += method.followup_groups(step.towards(method.teacher))
    with span("student_decoder"):
        outputs = student.decode(memory, groups, *_wanted(methods))
    step.student_outputs.update({output.group.role: output for output in outputs})
    return step


def _beside(step: Step, seen: Mapping[TeacherKind, Seen]) -> Step:
    """The step with its teacher; where there are several, with the step of the others beside it."""
    found = {
        kind: replace(
            step, teacher=one.teacher, teacher_memory=one.memory, teacher_groups=one.groups,
            teacher_outputs={},
        )
        for kind, one in seen.items()
    }  # fmt: skip
    if found:
        step = found.pop(next(iter(found)))
        step.beside = found
    return step


def _wanted(methods: Sequence[Method[Any]]) -> tuple[bool, frozenset[str]]:
    """Whether decoders hand out their attention, and the roles whose self-attention is read."""
    attention = any(method.needs_attention for method in methods)
    return attention, frozenset(role for method in methods for role in method.self_attention)


def _check_answerable(groups: Sequence[QueryGroup], teacher: Teacher) -> None:
    """Raises UserError ``method-teacher`` for queries a teacher cannot be asked."""
    if groups and "decode" not in teacher.offers:
        raise UserError(
            "method-teacher",
            f"{groups[0].role}: a {teacher.facts.family} teacher answers its own queries only; the "
            "method's needs() must name decode",
        )


def losses_of(
    step: Step, methods: Sequence[Method[Any]], weights: LossWeights
) -> dict[str, Tensor]:
    """All weighted losses of a step: the detection loss and what every method adds."""
    replaced = next((m for m in methods if m.replaces_detection_loss), None)
    losses = None if replaced is None else replaced.detection_losses(step.towards(replaced.teacher))
    if losses is None:
        losses = detection_losses(
            step.student_outputs, step.targets, step.normalizer, weights, step.generators
        )
    for method in methods:
        losses.update(method.losses(step.towards(method.teacher)))
    return losses
