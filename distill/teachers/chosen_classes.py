"""A teacher that knows more classes than the data, or has them in another order.

The one place where outputs are chosen by name, for teachers of every kind. Which queries the
teacher asks, and what it sees, stays as it was trained.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from detr.config import ClassesConfig, SigmoidClassesConfig, SoftmaxClassesConfig
from detr.errors import UserError
from detr.models import GroupOutput, Memory, QueryGroup, Teacher, TeacherPart, detections
from detr.models.class_names import listed, match_classes


def columns_of(
    place: Path | str, known: Sequence[str], wanted: Sequence[str], renamed: Mapping[str, str]
) -> tuple[int, ...]:
    """The teacher's class of each class of the data.

    Args:
        place: Of the teacher, for the message.
        known: Its class names, in the order of its outputs; empty where an output has no name.
        wanted: The data's.
        renamed: The teacher's names of those classes of the data that have another name there.

    Raises:
        UserError: ``teacher-classes`` where it lacks one of the data's classes, or where a renamed
            class is not one of the data's.
    """
    match = match_classes(wanted, known, renamed)
    if match.strange:
        raise UserError(
            "teacher-classes", f"teacher_classes: the data has no {listed(match.strange)}"
        )
    columns = tuple(column for column in match.columns if column is not None)
    if match.new:
        raise UserError(
            "teacher-classes",
            f"{place}: the teacher does not know {listed(match.new)}; it knows "
            f"{listed([name for name in known if name])}; teacher_classes maps a class of the data "
            "to the teacher's name",
        )
    return columns


class ChosenClasses(nn.Module):
    """Some of a teacher's classes, in the data's order, as a :class:`detr.models.Teacher`.

    Logits of all layers are chosen, and those of its proposals where they are of classes. Under a
    softmax, "no object" takes over what the left-out classes had, so that scores stay what they
    were.

    Args:
        teacher: Any teacher.
        columns: Its class of each class of the data.
        limit: Detections of an image.
    """

    def __init__(self, teacher: Teacher, columns: Sequence[int], limit: int) -> None:
        super().__init__()
        assert isinstance(teacher, nn.Module)
        self.teacher, self.limit = teacher, limit
        self.columns: Tensor
        self.others: Tensor
        others = sorted(set(range(teacher.facts.num_classes)) - set(columns))
        self.register_buffer("columns", torch.tensor(columns, dtype=torch.int64))
        self.register_buffer("others", torch.tensor(others, dtype=torch.int64))
        self.facts = replace(teacher.facts, num_classes=len(columns))
        self.offers: frozenset[TeacherPart] = teacher.offers

    def encode(self, images: Tensor, valid_sizes: Tensor) -> Memory:
        """See :class:`detr.models.Teacher`."""
        return self.teacher.encode(images, valid_sizes)

    def queries(self, memory: Memory) -> list[QueryGroup]:
        """See :class:`detr.models.Teacher`."""
        return [self._chosen_proposals(group) for group in self.teacher.queries(memory)]

    def decode(
        self,
        memory: Memory,
        groups: list[QueryGroup],
        attention: bool = False,
        self_attention: Collection[str] = (),
    ) -> list[GroupOutput]:
        """See :class:`detr.models.Teacher`."""
        return [
            replace(output, group=group, logits=[self._chosen(x) for x in output.logits])
            for group, output in zip(
                groups, self.teacher.decode(memory, groups, attention, self_attention), strict=True
            )
        ]

    def class_contents(self) -> Tensor | None:
        """See :class:`detr.models.Teacher`."""
        contents = self.teacher.class_contents()
        return None if contents is None else contents[self.columns]

    def forward(
        self, images: Tensor, valid_sizes: Tensor, original_sizes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`detr.models.Detector.forward`."""
        memory = self.encode(images, valid_sizes)
        (output,) = self.decode(memory, self.queries(memory))
        classes: ClassesConfig = SigmoidClassesConfig()
        if self.facts.scores == "softmax":
            classes = SoftmaxClassesConfig()
        return detections(output.logits[-1], output.boxes[-1], original_sizes, classes, self.limit)

    def _chosen(self, logits: Tensor) -> Tensor:
        """``[..., K]`` of the teacher's classes to those of the data, likewise with "no object"."""
        chosen = logits.index_select(-1, self.columns)
        if self.facts.scores == "sigmoid":
            return chosen
        rest = torch.cat((logits.index_select(-1, self.others), logits[..., -1:]), -1)
        return torch.cat((chosen, rest.logsumexp(-1, keepdim=True)), -1)

    def _chosen_proposals(self, group: QueryGroup) -> QueryGroup:
        proposals = group.proposals
        if proposals is None or proposals.class_agnostic:
            return group
        return replace(group, proposals=replace(proposals, logits=self._chosen(proposals.logits)))
