"""CLoCKDistill: consistent location-and-context-aware distillation (Lan and Tian, 2025).

Memory distillation (LCMD, section 3.1, equations 2 to 5): the student's encoder output follows the
teacher's, objects weighted by 1 / (their cells), background by 1 / (its cells), over all levels.

Logit distillation (TCLD, section 3.2, equations 6 to 10): both decoders answer the same queries,
made from the ground truth, next to KD-DETR's random ("general") points and the teacher's own
queries ("specific"), and the student follows the teacher's answers in proportion to the teacher's
confidence.

Where the paper is silent: LCMD is divided by the number of images (FGD); T is 10 (KD-DETR); the KL
divergence sums over classes and L1 over coordinates, as in the detection loss. With unequal decoder
depths only the last layers are compared (section 4.5.2).

Where the default is KD-DETR's reading and not what is printed: equation 9 has no factor T² and no
normalizer, and equation 10 takes the best of a *softmax*; here the divergence is multiplied by T²
(``squared_temperature``), the sum over all points of a batch is divided by the sum of their
weights, per layer (``normalize``), and the weight is the best sigmoid score, for these detectors
are trained with sigmoids (``confidence``).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from detr.config import Weight
from detr.models import GroupOutput, TeacherPart
from distill.distributed import mean_over_processes
from distill.methods.base import Method, Setting, align, float32
from distill.methods.parts.mask_pairs import MaskOptions, MaskPairs
from distill.methods.parts.masks import scale_masks
from distill.methods.parts.pairing import (
    LayerMap,
    Pairs,
    pair_decoders,
    pair_levels,
    split_levels,
)
from distill.methods.parts.points import (
    ForStudent,
    Scores,
    TargetAware,
    answer_distances,
    check_same_kind,
    general_points,
    specific_points,
)
from distill.methods.step import PairedGroup, Step

_TINY = 1e-6


class ClockDistillOptions(MaskOptions):
    """Options of CLoCKDistill; the defaults are the complete method at the published values.

    Attributes:
        memory: ``masked`` is LCMD, ``plain`` the mean squared error without masks (row "Mem" of
            table 5), ``off`` leaves the memory alone.
        alpha, beta: Weights of objects and background in LCMD.
        plain_weight: Weight of the plain error; the paper gives none.
        target_aware: Ask about the ground truth.
        copies: How often each true box is asked about.
        jitter: Noise on the further copies (0.4 is DN-DETR's); 0 leaves them identical.
        general: Ask random points.
        general_points: How many; as many as the teacher has queries by default.
        specific: Ask the teacher's own queries.
        temperature: Of the class distributions.
        squared_temperature: Multiply the divergence by the temperature's square; equation 9 does
            not.
        confidence: Of a point, from the teacher's scores: the best ``sigmoid``, or the best of a
            ``softmax`` as equation 10 has it.
        normalize: Divide by the sum of the confidences; else by the number of images, which is
            equation 9 for each image.
        class_weight, l1_weight, giou_weight: Lambdas of equation 9.
        mask_weight: Of the masks of the same pairs, which no paper has: :class:`MaskOptions`.
        layer_map: Teacher decoder layer (from 0) for each student layer, null for none.
    """

    memory: Literal["masked", "plain", "off"] = "masked"
    alpha: Weight = 5e-5
    beta: Weight = 1e-7
    plain_weight: Weight = 1.0
    target_aware: bool = True
    copies: Annotated[int, Field(ge=1, le=1000)] = 3
    jitter: Weight = 0.0
    general: bool = True
    general_points: Annotated[int, Field(ge=1, le=100_000)] | None = None
    specific: bool = True
    temperature: Annotated[float, Field(ge=1e-3, le=1e6)] = 10.0
    squared_temperature: bool = True
    confidence: Scores = "sigmoid"
    normalize: bool = True
    class_weight: Weight = 1.0
    l1_weight: Weight = 5.0
    giou_weight: Weight = 2.0
    layer_map: LayerMap | None = None


class ClockDistill(Method[ClockDistillOptions]):
    """CLoCKDistill (2025): masked encoder memory, and shared queries that stand on the objects.

    Raises:
        UserError: ``method-levels``, ``method-queries`` or ``method-layer-map`` where student and
            teacher cannot be paired.
    """

    name: ClassVar[str] = "clockdistill"

    @classmethod
    def needs(cls, options: ClockDistillOptions) -> frozenset[TeacherPart]:
        """The memory, and answers to whichever points are asked."""
        needed: set[TeacherPart] = {"predictions"}
        if options.memory != "off":
            needed.add("memory")
        if options.target_aware or options.general:
            needed.add("decode")
        if options.specific:
            needed.add("queries")
        return options.mask_parts | needed

    def __init__(self, options: ClockDistillOptions, setting: Setting) -> None:
        super().__init__(options, setting)
        teacher = setting.need_teacher()
        ours, theirs = setting.student.facts, teacher.facts
        if self.options.memory != "off":
            self.levels = pair_levels(ours, theirs, self.name)
            self.adapter = align(ours.width, theirs.width)
        self.roles = [
            part for part in ("target_aware", "general", "specific") if getattr(self.options, part)
        ]
        self.layers: Pairs = ()
        if self.roles:
            check_same_kind(ours, theirs, self.name)
            self.layers = pair_decoders(ours, theirs, self.options.layer_map, self.name)
            self.for_student = ForStudent(ours, theirs)
        off = None if self.roles else "target_aware: false with neither general nor specific"
        self.masks = MaskPairs(options, setting, self.layers, self.name, off)
        if self.options.target_aware:
            self.target_aware = TargetAware(teacher, self.options.copies, self.options.jitter)

    def groups(self, step: Step) -> list[PairedGroup]:
        """The distillation points.

        The teacher has answered its own queries already, and a group's answers do not depend on
        the others, so the specific points go to the student only.
        """
        assert step.teacher is not None
        options, facts = self.options, step.teacher.facts
        groups = []
        for part in self.roles:
            role = f"{self.name}/{part}"
            if part == "target_aware":
                group = self.target_aware(role, step.targets, step.generators)
            elif part == "general":
                count = options.general_points or facts.num_queries
                own = step.teacher_groups[0]
                group = general_points(role, own, count, facts, step.generator)
            else:
                group = specific_points(role, step.teacher_groups[0], facts)
            asked = None if part == "specific" else group
            groups.append(PairedGroup(role, self.for_student(group), asked))
        return groups

    def losses(self, step: Step) -> dict[str, Tensor]:
        """``memory`` (eq. 5), ``class``, ``l1`` and ``giou`` (eq. 9) and perhaps ``mask``."""
        losses: dict[str, Tensor] = {}
        if self.options.memory == "masked":
            losses[f"{self.name}/memory"] = self._masked_memory(step)
        elif self.options.memory == "plain":
            losses[f"{self.name}/memory"] = self._plain_memory(step)
        if self.roles:
            losses.update(self._logits(step))
        return losses

    def _errors(self, step: Step) -> list[Tensor]:
        """Squared errors of the memory, summed over channels, ``[B, H * W]`` per shared level."""
        ours, theirs = step.student_memory, step.teacher_memory
        assert theirs is not None
        student = split_levels(self.adapter(ours.tokens), ours)
        teacher = split_levels(theirs.tokens.detach(), theirs)
        return [
            (float32(teacher[t]) - float32(student[s])).square().sum(-1) for s, t in self.levels
        ]

    def _masked_memory(self, step: Step) -> Tensor:
        foreground, background = scale_masks(step.targets, step.student_memory)
        weights = split_levels(
            self.options.alpha * foreground + self.options.beta * background, step.student_memory
        )
        terms = [
            (weights[s] * error).sum()
            for (s, _), error in zip(self.levels, self._errors(step), strict=True)
        ]
        return torch.stack(terms).sum() / len(step.targets)

    def _plain_memory(self, step: Step) -> Tensor:
        assert step.teacher_memory is not None
        padding = split_levels(step.student_memory.padding, step.student_memory)
        valid = torch.cat([~padding[s] for s, _ in self.levels], 1)
        count = mean_over_processes(valid.sum().to(torch.float32))
        error = torch.cat(self._errors(step), 1)
        width = step.teacher_memory.tokens.shape[-1]
        return self.options.plain_weight * (error * valid).sum() / (count * width)

    def _logits(self, step: Step) -> dict[str, Tensor]:
        """TCLD: all points of a layer share one normalizer, if any, so confident ones lead."""
        options = self.options
        compared = [
            answer_distances(
                step.student_outputs[f"{self.name}/{part}"],
                self._answers(step, part),
                self.layers,
                options.temperature,
                options.confidence,
            )
            for part in self.roles
        ]
        weights = torch.cat([c.confidence for c in compared], -1)
        total = weights.new_full((len(weights),), float(len(step.targets)))
        if options.normalize:
            total = mean_over_processes(weights.sum((1, 2))).clamp(min=_TINY)
        divergence = options.class_weight
        if not options.squared_temperature:
            divergence /= options.temperature**2

        def summed(terms: list[Tensor]) -> Tensor:
            return ((weights * torch.cat(terms, -1)).sum((1, 2)) / total).sum()

        losses = {
            f"{self.name}/class": divergence * summed([c.kl for c in compared]),
            f"{self.name}/l1": options.l1_weight * summed([c.l1 for c in compared]),
            f"{self.name}/giou": options.giou_weight * summed([c.giou for c in compared]),
        }
        if self.masks.on:
            apart = [
                self.masks.of_same_queries(
                    step,
                    step.student_outputs[f"{self.name}/{part}"],
                    self._answers(step, part),
                    points.confidence,
                )
                for part, points in zip(self.roles, compared, strict=True)
            ]
            losses[f"{self.name}/mask"] = summed(apart)
        return losses

    def _answers(self, step: Step, part: str) -> GroupOutput:
        """What the teacher said to the points."""
        return step.teacher_outputs["own" if part == "specific" else f"{self.name}/{part}"]
