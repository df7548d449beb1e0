"""OD-DETR: online distillation for detection transformers (2024): the teacher is an average.

The teacher is the exponential moving average of the student (decay 0.9996, constant); recipes set
``ema: 0.9996``, ``ema_rising: false`` and ``ema_evaluated: false``. Its assignment of ground truth
to queries changes less from step to step than the student's and is taught in three ways:

* matching distillation (section 3.2, equations 2 to 4) replaces the detection loss of the own
  queries, see :mod:`distill.methods.parts.two_matchings`;
* prediction distillation (section 3.3, equations 5 and 6): the student also answers the teacher's
  queries; its scores follow the teacher's, its boxes where the teacher's are better;
* an auxiliary group (section 3.4): for every decoder layer of the teacher the two best queries per
  object, with their updated content and boxes, go through the student's decoder from the start.

Equation 7 sums the parts. Where the paper is silent: layers are paired one to one; queries
correspond by index, also for two-stage anchors; the student's cost of a layer decides which of two
queries at a box is the costlier; prediction distillation uses the teacher's anchors and positions;
queries without a box have no box distillation; the inner weights are the detection loss's. Losses
of proposals and denoising queries stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from detr.errors import UserError
from detr.models import GroupOutput, QueryGroup, cxcywh_to_xyxy
from distill.losses.detection import side_losses
from distill.losses.masks import Points, mask_losses, masks_of
from distill.losses.matcher import match_costs
from distill.losses.matches import Matches
from distill.losses.overlap import giou
from distill.losses.sets import weighted
from distill.losses.targets import JoinedTargets, pair_iou
from distill.methods.base import Method, Setting, float32
from distill.methods.parts.best_queries import (
    BestQueries,
    best_queries,
    original_matches,
    stages,
)
from distill.methods.parts.mask_pairs import MaskOptions, MaskPairs
from distill.methods.parts.teacher_group import ground_truth_losses
from distill.methods.parts.two_matchings import (
    Rules,
    matching_losses,
    quality_focal_loss,
)
from distill.methods.step import PairedGroup, PerStep, Step

Exponent = Annotated[float, Field(ge=0, le=100)]


class OdDetrOptions(MaskOptions):
    """Options of OD-DETR; the defaults are the complete method at the published values.

    Attributes:
        matching: Distil the matching; without it the own queries learn their own matches only.
        matching_boxes: The teacher's matches also regress (else classification only, table 4).
        classification: ``quality`` focal loss, or plain ``focal`` (table 3).
        least_iou: Teacher matches count only above this IoU: 0.5 is conditional matching
            distillation, the rival of table 3.
        down_weight: w_d, of the costlier of two queries at a box; 1 switches it off.
        down_weight_classes: w_d also weighs the classification (table 4).
        matching_layers: Teacher layer whose matches a student layer gets: ``paired`` or ``final``.
        cost_of: Whose matching cost decides which of two queries is the costlier.
        shared_anchors: The student proposes from the tokens the teacher proposes from, so that
            equal indices are equal places; for two-stage and mixed queries.
        prediction: Distil predictions.
        task_aligned: Scores of matched queries become score^alpha * IoU^beta (TOOD).
        alpha, beta: These exponents.
        prediction_target: What the student's answers to the teacher's queries learn: the
            ``teacher``'s, or the ``ground_truth`` as the teacher assigns it (DETRDistill's
            query-prior assignment, the rival of table 5).
        listen: Boxes follow the teacher's only where those are better ("Listen2stu").
        unmatched_boxes: Boxes of queries without an object follow, too (the naive rival).
        positions: Whose positions and anchors the prediction group has.
        mask_weight: Of the masks of the same pairs, which no paper has: :class:`MaskOptions`.
        stop_update: The teacher stands still once the learning rate has dropped.
        auxiliary: Train the auxiliary group.
        auxiliary_queries: Queries per object and teacher layer.
        auxiliary_matching: ``both`` is matching distillation, ``original`` keeps the teacher's
            matches, ``rematch`` makes new ones (the rivals).
        auxiliary_sum: The groups of the teacher's layers add up (``sum``) or are averaged.
    """

    matching: bool = True
    matching_boxes: bool = True
    classification: Literal["quality", "focal"] = "quality"
    least_iou: Annotated[float, Field(ge=0, le=1)] | None = None
    down_weight: Annotated[float, Field(ge=0, le=1)] = 0.51
    down_weight_classes: bool = False
    matching_layers: Literal["paired", "final"] = "paired"
    cost_of: Literal["student", "teacher"] = "student"
    shared_anchors: bool = False
    prediction: bool = True
    task_aligned: bool = True
    alpha: Exponent = 0.25
    beta: Exponent = 0.75
    prediction_target: Literal["teacher", "ground_truth"] = "teacher"
    listen: bool = True
    unmatched_boxes: bool = False
    positions: Literal["teacher", "student"] = "teacher"
    stop_update: bool = True
    auxiliary: bool = True
    auxiliary_queries: Annotated[int, Field(ge=1, le=1000)] = 2
    auxiliary_matching: Literal["both", "original", "rematch"] = "both"
    auxiliary_sum: Literal["sum", "mean"] = "sum"


@dataclass(frozen=True)
class TeacherAssignment:
    """The teacher's own queries and the ground truth.

    Attributes:
        costs: ``[T, B, N, G]`` of every layer's queries with every (padded) box.
        matches: The assignment of least cost.
    """

    costs: Tensor
    matches: Matches


class OdDetr(Method[OdDetrOptions]):
    """OD-DETR (2024): a running average of the student stabilises its matching and predictions.

    Raises:
        UserError: ``method-queries`` where the teacher has other layers or queries, as for a model
            within an elastic training: both are compared by number.
    """

    name: ClassVar[str] = "od_detr"
    teacher: ClassVar[Literal["none", "frozen", "ema"]] = "ema"
    replaces_detection_loss: ClassVar[bool] = True

    def __init__(self, options: OdDetrOptions, setting: Setting) -> None:
        super().__init__(options, setting)
        ours, theirs = (
            (model.facts.decoder_layers, model.facts.num_queries)
            for model in (setting.student, setting.need_teacher())
        )
        if ours != theirs:
            raise UserError(
                "method-queries",
                f"methods.{self.name}: its teacher is an average of the student itself, with "
                f"{ours[0]} decoder layers and {ours[1]} queries; here it has {theirs[0]} and "
                f"{theirs[1]}",
            )
        self.loss = setting.loss
        off = None if options.prediction else "prediction: false"
        if options.prediction and options.prediction_target == "ground_truth":
            off = "prediction_target: ground_truth"
        depth = range(setting.student.facts.decoder_layers)
        pairs = tuple((i, i) for i in depth)
        self.masks = MaskPairs(options, setting, pairs, self.name, off)
        self.costs = setting.loss.costs
        self.teacher_assignment = PerStep(self._assign_teacher)
        self.best_queries = PerStep(self._best_queries)
        self.learned = setting.student.facts.query_start == "points"
        self.first_drop = setting.drops[0] if setting.drops else None
        self.rules = Rules(
            options.classification,
            options.least_iou,
            options.matching_boxes,
            options.down_weight,
            options.down_weight_classes,
        )

    def updates_teacher(self, index: int) -> bool:
        """Stop update (section 3.3): not after the learning rate has dropped."""
        return not self.options.stop_update or self.first_drop is None or index < self.first_drop

    def groups(self, step: Step) -> list[PairedGroup]:
        """The teacher's queries for the student (section 3.3)."""
        if self.options.shared_anchors:
            self._share_anchors(step)
        if not self.options.prediction:
            return []
        own = step.teacher_groups[0]
        place = own if self.options.positions == "teacher" else step.student_groups[0]
        role = f"{self.name}/prediction"
        position = place.position if self.learned else None
        group = QueryGroup(
            role,
            content=own.content.detach(),
            reference=place.reference.detach(),
            position=None if position is None else position.detach(),
        )
        return [PairedGroup(role, group, None)]

    @staticmethod
    def _share_anchors(step: Step) -> None:
        """Remakes the student's own queries from the teacher's tokens."""
        proposals = step.teacher_groups[0].proposals
        if proposals is not None:
            step.student_groups[0] = step.student.source(step.student_memory, proposals.indices)

    def followup_groups(self, step: Step) -> list[QueryGroup]:
        """The auxiliary group: one block per teacher layer (section 3.4)."""
        if not self.options.auxiliary or not any(len(t.labels) for t in step.targets):
            return []
        chosen = self.best_queries(step)
        return [chosen.group(f"{self.name}/auxiliary", self.learned)]

    def detection_losses(self, step: Step) -> dict[str, Tensor]:
        """``own/...`` by matching distillation; those of the other queries unchanged."""
        own = step.student_outputs["own"]
        logits, boxes = torch.stack(own.logits), torch.stack(own.boxes)
        costs = self.costs.matrix(logits, boxes, step.targets)
        matches = match_costs(costs, step.targets)
        other = None
        if self.options.matching:
            other = self.teacher_assignment(step).matches
            if self.options.matching_layers == "final":
                layers = len(own.logits)
                other = other.layers([layers - 1] * layers)
        if self.options.cost_of == "teacher":
            costs = self.teacher_assignment(step).costs
        parts = matching_losses(
            logits, boxes, step.targets, matches, other, costs, step.normalizer, self.rules
        )
        masks = masks_of(own, Points(self.loss.mask_points, step.generators), first=False)
        if masks is not None:
            # The paper has no masks: they learn as usual.
            parts |= mask_losses(masks, step.targets, matches, step.normalizer)
        return weighted("own", parts, self.loss) | side_losses(
            step.student_outputs, step.targets, step.normalizer, self.loss, step.generators
        )

    def losses(self, step: Step) -> dict[str, Tensor]:
        """``prediction_*`` (equations 5 and 6) and ``auxiliary_*``."""
        losses: dict[str, Tensor] = {}
        if self.options.prediction and self.options.prediction_target == "teacher":
            parts, weights = self._prediction(step)
            losses |= self._named("prediction", parts)
            if self.masks.on:
                losses[f"{self.name}/prediction_mask"] = self._masks(step, weights)
        elif self.options.prediction:
            losses |= self._query_prior(step)
        if self.options.auxiliary:
            losses |= self._named("auxiliary", self._auxiliary(step))
        return losses

    def _named(self, part: str, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """A part's weighted losses."""
        return {
            f"{self.name}/{part}_{key.removeprefix('x/')}": value
            for key, value in weighted("x", parts, self.loss).items()
        }

    def _assign_teacher(self, step: Step) -> TeacherAssignment:
        teacher = step.teacher_outputs["own"]
        predictions = torch.stack(teacher.logits), torch.stack(teacher.boxes)
        costs = self.costs.matrix(*predictions, step.targets)
        return TeacherAssignment(costs, match_costs(costs, step.targets))

    def _best_queries(self, step: Step) -> BestQueries:
        costs = self.teacher_assignment(step).costs
        per_box = self.options.auxiliary_queries
        return best_queries(step.teacher_outputs["own"], step.targets, costs, per_box)

    def _prediction(self, step: Step) -> tuple[dict[str, Tensor], Tensor]:
        """Section 3.3 on all layers, and what each query's box weighs, ``[L, B, N]``."""
        options = self.options
        student = step.student_outputs[f"{self.name}/prediction"]
        teacher = step.teacher_outputs["own"]
        logits, boxes = torch.stack(student.logits), float32(torch.stack(student.boxes))
        their_boxes = float32(torch.stack(teacher.boxes)).detach()
        matches = self.teacher_assignment(step).matches
        truth = JoinedTargets.of(step.targets)
        their_iou = pair_iou(their_boxes, matches, truth)
        scores = self._scores(teacher, matches, their_iou, truth)
        class_loss = quality_focal_loss(logits, scores).sum() / step.normalizer

        place = (matches.layer, matches.image, matches.query)
        entry = (*place, truth.of_pairs(matches)[1])
        weight = scores[entry]
        if options.listen:
            weight = weight * (their_iou > pair_iou(boxes, matches, truth))
        weights = torch.zeros_like(scores[..., 0])
        if options.unmatched_boxes:
            weights = scores.amax(-1)
        weights[place] = weight
        l1 = (boxes - their_boxes).abs().sum(-1)
        overlap = giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(their_boxes))
        parts = {
            "class": class_loss,
            "l1": (weights * l1).sum() / step.normalizer,
            "giou": (weights * (1 - overlap)).sum() / step.normalizer,
        }
        return parts, weights

    def _masks(self, step: Step, weights: Tensor) -> Tensor:
        """Masks of the queries whose boxes follow the teacher's, weighed as these are."""
        student = step.student_outputs[f"{self.name}/prediction"]
        teacher = step.teacher_outputs["own"]
        apart = self.masks.of_same_queries(step, student, teacher, weights)
        return (weights * apart).sum() / step.normalizer

    def _query_prior(self, step: Step) -> dict[str, Tensor]:
        """DETRDistill's query-prior assignment, with this teacher."""
        output = step.student_outputs[f"{self.name}/prediction"]
        matches = self.teacher_assignment(step).matches
        found = ground_truth_losses(output, step.targets, matches, step.normalizer, self.loss)
        return {f"{self.name}/prediction_{key}": value for key, value in found.items()}

    def _scores(
        self, teacher: GroupOutput, matches: Matches, their_iou: Tensor, truth: JoinedTargets
    ) -> Tensor:
        """The teacher's scores ``[L, B, N, K]``, those of matched queries by equation 5."""
        scores = float32(torch.stack(teacher.logits)).detach().sigmoid()
        if self.options.task_aligned:
            labels = truth.of_pairs(matches)[1]
            entry = (matches.layer, matches.image, matches.query, labels)
            scores[entry] = scores[entry] ** self.options.alpha * their_iou**self.options.beta
        return scores

    def _auxiliary(self, step: Step) -> dict[str, Tensor]:
        """Section 3.4: matching distillation on every teacher layer's block."""
        output = step.student_outputs.get(f"{self.name}/auxiliary")
        if output is None or not any(len(t.labels) for t in step.targets):
            nothing = 0.0 * step.student_outputs["own"].logits[-1].sum()
            return {"class": nothing, "l1": nothing, "giou": nothing}
        chosen = self.best_queries(step)
        logits, boxes = (
            stages(torch.stack(x), chosen.stages) for x in (output.logits, output.boxes)
        )
        costs = self.costs.matrix(logits, boxes, step.targets)
        kind = self.options.auxiliary_matching
        own = original = None
        if kind != "original":
            own = match_costs(costs, step.targets, chosen.padding)
        if kind != "rematch":
            theirs = self.teacher_assignment(step).matches
            original = original_matches(chosen, theirs, step.targets, len(output.logits))
        first, second = (own, original) if own is not None else (original, None)
        assert first is not None
        parts = matching_losses(
            logits,
            boxes,
            step.targets,
            first,
            second,
            costs,
            step.normalizer,
            self.rules,
            chosen.padding,
        )
        share = 1 / chosen.stages if self.options.auxiliary_sum == "mean" else 1.0
        return {key: share * value for key, value in parts.items()}
