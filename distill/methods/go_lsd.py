"""GO-LSD: distributions of edges follow better ones (D-FINE, ICLR 2025, section 4.2).

``go_lsd`` is the paper's: within one detector, each decoder layer's distributions follow the last
layer's, for all queries. A matched query weighs as much as the IoU of its box, any other as much as
the last layer's best score; matches are the union of all layers'. Denoising queries do the same
with the matches that they know, and share the two means' weights with the own queries, as in the
released code. There, fillers of the denoising group take part; here they do not.

``go_lsd_teacher`` is not in the paper: the same between two detectors. The teacher's queries go
through the student's decoder as a further group, so both speak of the same query; each of the
student's layers follows the teacher's last, whose distributions are carried over to the student's
places. Weights are the teacher's: the IoU of its box where it was matched, else its best score.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from detr.config import Strict, Weight
from detr.errors import UserError
from detr.models import Facts, GroupOutput, TeacherPart
from distill.losses.detection import denoising_matches, match_own
from distill.losses.matches import Matches
from distill.losses.targets import JoinedTargets, pair_iou
from distill.losses.weights import LossWeights
from distill.methods.base import Method, Setting, float32
from distill.methods.parts.edge_kl import Halves, carried_over, decoupled, edge_divergence
from distill.methods.parts.points import ForStudent, check_same_kind, specific_points
from distill.methods.step import PairedGroup, Step, TeacherKind


class GoLsdOptions(Strict):
    """Options of GO-LSD.

    Attributes:
        weight: Of the loss (the paper's DDF).
        temperature: Of the distributions.
    """

    weight: Weight = 1.5
    temperature: Annotated[float, Field(gt=0, le=1000)] = 5.0


def _check_edges(facts: Facts, who: str, method: str) -> None:
    """Raises UserError ``method-edges`` where boxes are not read off distributions."""
    if not facts.edges:
        raise UserError(
            "method-edges",
            f"methods.{method}: compares distributions of edges, and the {who}'s boxes are read "
            "off none; decoder.refinement: distribution has them",
        )


def _matched(matches: Matches, like: Tensor) -> Tensor:
    """``[B, N]`` bool, which queries have a box."""
    found = torch.zeros(like.shape[:2], dtype=torch.bool, device=like.device)
    found[matches.image, matches.query] = True
    return found


class GoLsd(Method[GoLsdOptions]):
    """Global optimal localization self-distillation between a decoder's layers.

    Raises:
        UserError: ``method-edges`` for a student without distributions, or of one layer.
    """

    name: ClassVar[str] = "go_lsd"
    teacher: ClassVar[TeacherKind] = "none"

    def __init__(self, options: GoLsdOptions, setting: Setting) -> None:
        super().__init__(options, setting)
        facts = setting.student.facts
        _check_edges(facts, "student", self.name)
        if facts.decoder_layers < 2:
            raise UserError(
                "method-edges", f"methods.{self.name}: the only decoder layer has none to follow"
            )
        self.loss = setting.loss.replace(box_pairs="union")

    def losses(self, step: Step) -> dict[str, Tensor]:
        """``own`` and, where there are such queries, ``denoising``."""
        own = step.student_outputs["own"]
        union = match_own(own, step.targets, self.loss).union
        shares = Halves.of(_matched(union, own.boxes[-1]))
        losses = {"own": self._followed(own, union, step, shares)}
        noisy = step.student_outputs.get("denoising")
        if noisy is not None and noisy.group.denoising is not None:
            known = denoising_matches(noisy, step.targets).at(0)
            found = self._followed(noisy, known, step, shares)
            losses["denoising"] = self.loss.denoising * found
        return {f"{self.name}/{key}": self.options.weight * x for key, x in losses.items()}

    def _followed(
        self, output: GroupOutput, matches: Matches, step: Step, shares: Halves
    ) -> Tensor:
        """All layers but the last after the last, summed over layers."""
        layers, temperature = len(output.edges) - 1, self.options.temperature
        padding = output.group.padding
        goal = (float32(output.edges[-1].detach()) / temperature).softmax(-1)
        confidence = float32(output.logits[-1].detach()).sigmoid().amax(-1)
        if padding is not None:
            confidence = confidence.masked_fill(padding, 0.0)
        matched = _matched(matches, goal)
        numbers = Halves.of(matched, padding)
        truth = JoinedTargets.of(step.targets)
        total = goal.new_zeros(())
        for layer in range(layers):
            weight = confidence.clone()
            overlap = pair_iou(output.boxes[layer][None], matches, truth)
            weight[matches.image, matches.query] = overlap
            divergence = edge_divergence(output.edges[layer], goal, temperature)
            total = total + decoupled(divergence, weight, matched, numbers, shares)
        return total


class GoLsdTeacher(Method[GoLsdOptions]):
    """The student's distributions follow the teacher's, on the teacher's queries.

    Raises:
        UserError: ``method-edges`` where one of them has no distributions, ``method-queries`` where
            they cannot share queries.
    """

    name: ClassVar[str] = "go_lsd_teacher"

    @classmethod
    def needs(cls, options: GoLsdOptions) -> frozenset[TeacherPart]:
        """Its answers to its queries, and the queries."""
        return frozenset({"predictions", "queries"})

    def __init__(self, options: GoLsdOptions, setting: Setting) -> None:
        super().__init__(options, setting)
        ours, theirs = setting.student.facts, setting.need_teacher().facts
        _check_edges(ours, "student", self.name)
        _check_edges(theirs, "teacher", self.name)
        check_same_kind(ours, theirs, self.name)
        self.for_student = ForStudent(ours, theirs)
        self.loss: LossWeights = setting.loss.replace(box_pairs="union")

    def groups(self, step: Step) -> list[PairedGroup]:
        """The teacher's queries for the student."""
        assert step.teacher is not None
        group = specific_points(self.name, step.teacher_groups[0], step.teacher.facts)
        return [PairedGroup(self.name, self.for_student(group), None)]

    def losses(self, step: Step) -> dict[str, Tensor]:
        """``edges``: every layer after the teacher's last, summed over layers."""
        ours, theirs = step.student_outputs[self.name], step.teacher_outputs["own"]
        assert ours.first is not None and theirs.first is not None
        temperature = self.options.temperature
        goal = carried_over(theirs.edges[-1], theirs.first, ours.first, temperature)
        matches = match_own(theirs, step.targets, self.loss).union
        weight = float32(theirs.logits[-1]).sigmoid().amax(-1)
        truth = JoinedTargets.of(step.targets)
        weight[matches.image, matches.query] = pair_iou(theirs.boxes[-1][None], matches, truth)
        matched = _matched(matches, goal)
        numbers = Halves.of(matched)
        total = goal.new_zeros(())
        for edges in ours.edges:
            divergence = edge_divergence(edges, goal, temperature)
            total = total + decoupled(divergence, weight, matched, numbers, numbers)
        return {f"{self.name}/edges": self.options.weight * total}
