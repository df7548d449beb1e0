"""KD-DETR: consistent distillation points sampling (Wang et al., CVPR 2024).

General points are random queries, new in every step; specific points are the teacher's queries.
Both models answer them, and the student's answers are pulled to the teacher's in proportion to the
teacher's confidence (best sigmoid score).

The released code departs from the paper in two places, each a switch:

* ``layers``: it compares *every* student layer with the teacher's *last* layer (``final``, the
  default), where the paper pairs layers (``paired``);
* ``class_sum``: its class term is a mean over classes and a plain sum over queries (``official``,
  the default). That sum runs over the 8 images of one of its GPUs; here it is the mean over images
  times 8, so the batch size does not change the weight. ``normalized`` sums over classes and
  divides by the sum of the weights, like the box terms.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from detr.config import Weight
from detr.models import TeacherPart
from distill.distributed import mean_over_processes
from distill.methods.base import Method, Setting
from distill.methods.parts.mask_pairs import MaskOptions, MaskPairs
from distill.methods.parts.pairing import LayerMap, Pairs, pair_decoders
from distill.methods.parts.points import (
    AnswerDistances,
    ForStudent,
    answer_distances,
    check_same_kind,
    general_points,
    specific_points,
)
from distill.methods.step import PairedGroup, Step

_TINY = 1e-6
# Images per process in the released training script.
_OFFICIAL_BATCH = 8


class KdDetrOptions(MaskOptions):
    """Options of KD-DETR.

    Attributes:
        general: Ask random points.
        general_points: How many; as many as the teacher has queries by default.
        specific: Ask the teacher's own queries.
        layers: ``final`` compares every student layer with the teacher's last, ``paired`` layer
            with layer.
        layer_map: With ``paired``: teacher decoder layer (from 0) for each student layer, null for
            none.
        class_sum: How the class term is summed, see the module.
        temperature: Of the class distributions.
        class_weight, l1_weight, giou_weight: Lambdas of the three terms.
        mask_weight: Of the masks of the same pairs, which no paper has: :class:`MaskOptions`.
    """

    general: bool = True
    general_points: Annotated[int, Field(ge=1, le=100_000)] | None = None
    specific: bool = True
    layers: Literal["final", "paired"] = "final"
    layer_map: LayerMap | None = None
    class_sum: Literal["official", "normalized"] = "official"
    temperature: Annotated[float, Field(ge=1e-3, le=1e6)] = 10.0
    class_weight: Weight = 1.0
    l1_weight: Weight = 5.0
    giou_weight: Weight = 2.0


class KdDetr(Method[KdDetrOptions]):
    """KD-DETR (CVPR 2024): random queries and the teacher's own, answered by both models.

    Raises:
        UserError: ``method-queries`` or ``method-layer-map`` where student and teacher cannot be
            paired.
    """

    name: ClassVar[str] = "kd_detr"

    @classmethod
    def needs(cls, options: KdDetrOptions) -> frozenset[TeacherPart]:
        """Answers to random points, and to the teacher's own."""
        needed: set[TeacherPart] = {"predictions"}
        if options.general:
            needed.add("decode")
        if options.specific:
            needed.add("queries")
        return options.mask_parts | needed

    def __init__(self, options: KdDetrOptions, setting: Setting) -> None:
        super().__init__(options, setting)
        ours, theirs = setting.student.facts, setting.need_teacher().facts
        check_same_kind(ours, theirs, self.name)
        last = theirs.decoder_layers - 1
        self.layers: Pairs = tuple((i, last) for i in range(ours.decoder_layers))
        if self.options.layers == "paired":
            self.layers = pair_decoders(ours, theirs, self.options.layer_map, self.name)
        self.parts = [part for part in ("general", "specific") if getattr(self.options, part)]
        off = None if self.parts else "general: false with specific: false"
        self.masks = MaskPairs(options, setting, self.layers, self.name, off)
        self.for_student = ForStudent(ours, theirs)

    def groups(self, step: Step) -> list[PairedGroup]:
        """The distillation points; the teacher has answered its own queries already."""
        assert step.teacher is not None
        facts = step.teacher.facts
        groups = []
        if self.options.general:
            role = f"{self.name}/general"
            count = self.options.general_points or facts.num_queries
            own = step.teacher_groups[0]
            group = general_points(role, own, count, facts, step.generator)
            groups.append(PairedGroup(role, self.for_student(group), group))
        if self.options.specific:
            role = f"{self.name}/specific"
            group = specific_points(role, step.teacher_groups[0], facts)
            groups.append(PairedGroup(role, self.for_student(group), None))
        return groups

    def losses(self, step: Step) -> dict[str, Tensor]:
        """Per part ``class``, ``l1``, ``giou`` and perhaps ``mask``, summed over layers."""
        options = self.options
        losses: dict[str, Tensor] = {}
        for part in self.parts:
            role = f"{self.name}/{part}"
            teacher = step.teacher_outputs["own" if part == "specific" else role]
            student = step.student_outputs[role]
            compared = answer_distances(student, teacher, self.layers, options.temperature)
            weights = compared.confidence
            total = mean_over_processes(weights.sum((1, 2))).clamp(min=_TINY)
            # The released code takes the mean over the four coordinates, then weighs it with 5.
            l1 = ((weights * compared.l1 / 4).sum((1, 2)) / total).sum()
            giou = ((weights * compared.giou).sum((1, 2)) / total).sum()
            classes = teacher.logits[-1].shape[-1]
            losses[f"{role}_class"] = options.class_weight * self._class(compared, total, classes)
            losses[f"{role}_l1"] = options.l1_weight * l1
            losses[f"{role}_giou"] = options.giou_weight * giou
            if self.masks.on:
                apart = self.masks.of_same_queries(step, student, teacher, weights)
                losses[f"{role}_mask"] = ((weights * apart).sum((1, 2)) / total).sum()
        return losses

    def _class(self, compared: AnswerDistances, total: Tensor, classes: int) -> Tensor:
        """The class term, see ``class_sum``."""
        summed = (compared.confidence * compared.kl).sum((1, 2))
        if self.options.class_sum == "normalized":
            return (summed / total).sum()
        images = compared.kl.shape[1]
        return summed.sum() * (_OFFICIAL_BATCH / (images * classes))
