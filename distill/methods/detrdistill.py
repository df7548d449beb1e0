"""DETRDistill: a universal knowledge distillation framework for DETR families (ICCV 2023).

Hungarian-matching logits distillation: in every layer all student queries are assigned to teacher
queries by their predictions and follow them. Target-aware feature distillation: feature maps follow
the teacher's where the teacher's good queries look alike. Query-prior assignment: the teacher's
queries go through the student's decoder as a further group that learns the ground truth with the
teacher's assignment.

From the released code: cross-entropy summed over classes, L1 and GIoU with weights 1, 5 and 2,
divided by the pairs; the feature mask is, per teacher layer, the sum over its 100 best (query,
class) entries of the cosine between query and cell times score times best IoU with an object, at
least 0.01, divided by its largest value, and weighs the squared error, which is averaged over the
cells and channels of a level and summed over levels and layers. That code accepts the teacher's
assignment but never passes it on, so it matches anew: ``assignment: rematch``. Its contrastive
query loss is in no formula of the paper and not here. Where both are silent: the mask's largest
value is taken per image and level; the weight of the features (20) is from memory.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from detr.config import Weight
from detr.errors import UserError
from detr.models import GroupOutput, Target, TeacherPart, cxcywh_to_xyxy
from distill.distributed import mean_over_processes
from distill.losses.linear_assignment import assign
from distill.losses.overlap import iou
from distill.losses.targets import pad_targets
from distill.methods.base import Method, Setting, float32
from distill.methods.parts.feature_pairs import FeaturePairs
from distill.methods.parts.mask_pairs import MaskOptions, MaskPairs, QueryPairs
from distill.methods.parts.pairing import LayerMap, pair_decoders
from distill.methods.parts.points import ForStudent, check_same_kind, specific_points
from distill.methods.parts.prediction_pairs import PairWeights, Predictions, distances, pair_costs
from distill.methods.parts.teacher_group import (
    ground_truth_losses,
    layer_matches,
    teacher_assigned,
)
from distill.methods.step import PairedGroup, Step

_LEAST = 0.01


class DetrDistillOptions(MaskOptions):
    """Options of DETRDistill; the defaults are the complete method.

    Attributes:
        logits, features, prior: Switch the three parts.
        class_weight, l1_weight, giou_weight: Of the logits distillation and its assignment.
        mask_weight: Of the masks of the same pairs, which no paper has: :class:`MaskOptions`.
        feature_weight: Of the feature distillation.
        on: Which maps: ``neck`` (what enters the encoder) or ``memory`` (what leaves it).
        entries: Best (query, class) entries that make the mask.
        assignment: The further group keeps the ``teacher``'s matches, or makes new ones
            (``rematch``).
        prior_weight: Of the further group's detection loss.
        layer_map: Teacher decoder layer (from 0) for each student layer, null for none.
    """

    logits: bool = True
    features: bool = True
    prior: bool = True
    class_weight: Weight = 1.0
    l1_weight: Weight = 5.0
    giou_weight: Weight = 2.0
    feature_weight: Weight = 20.0
    on: Literal["neck", "memory"] = "neck"
    entries: Annotated[int, Field(ge=1, le=100_000)] = 100
    assignment: Literal["teacher", "rematch"] = "teacher"
    prior_weight: Weight = 1.0
    layer_map: LayerMap | None = None


class DetrDistill(Method[DetrDistillOptions]):
    """DETRDistill (ICCV 2023): assigned logits, target-aware features, the teacher's queries.

    Raises:
        UserError: ``method-queries``, ``method-levels`` or ``method-layer-map`` where student and
            teacher cannot be paired.
    """

    name: ClassVar[str] = "detrdistill"

    @classmethod
    def needs(cls, options: DetrDistillOptions) -> frozenset[TeacherPart]:
        """Predictions always; maps for the features, queries for these and the further group."""
        needed: set[TeacherPart] = {"predictions"}
        if options.features:
            needed.add(options.on)
        if options.features or options.prior:
            needed.add("queries")
        return options.mask_parts | needed

    def __init__(self, options: DetrDistillOptions, setting: Setting) -> None:
        super().__init__(options, setting)
        ours, theirs = setting.student.facts, setting.need_teacher().facts
        self.layers = pair_decoders(ours, theirs, self.options.layer_map, self.name)
        self.weights = PairWeights(
            self.options.class_weight, self.options.l1_weight, self.options.giou_weight
        )
        self.loss = setting.loss
        off = None if options.logits else "logits: false"
        self.masks = MaskPairs(options, setting, self.layers, self.name, off)
        if self.options.features:
            # The mask compares queries, which have the memory's width, with cells of the map.
            if self.options.on == "neck" and theirs.neck_width != theirs.width:
                raise UserError(
                    "method-width",
                    f"methods.{self.name}: the teacher's maps have {theirs.neck_width} channels at "
                    f"its neck and its queries {theirs.width}; set on: memory",
                )
            self.maps = FeaturePairs(self.options.on, ours, theirs, self.name)
        if self.options.prior:
            check_same_kind(ours, theirs, self.name)
            self.for_student = ForStudent(ours, theirs)

    def groups(self, step: Step) -> list[PairedGroup]:
        """The teacher's queries for the student."""
        if not self.options.prior:
            return []
        assert step.teacher is not None
        role = f"{self.name}/prior"
        group = specific_points(role, step.teacher_groups[0], step.teacher.facts)
        return [PairedGroup(role, self.for_student(group), None)]

    def losses(self, step: Step) -> dict[str, Tensor]:
        """``class``, ``l1``, ``giou`` (``mask``); ``features``; ``prior_*``, a detection loss."""
        losses: dict[str, Tensor] = {}
        if self.options.logits:
            losses |= self._logits(step)
        if self.options.features:
            losses["features"] = self.options.feature_weight * self._features(step)
        if self.options.prior:
            losses |= self._prior(step)
        return {f"{self.name}/{key}": value for key, value in losses.items()}

    def _logits(self, step: Step) -> dict[str, Tensor]:
        """Every layer's assigned pairs, their mean, summed over layers."""
        ours, theirs = step.student_outputs["own"], step.teacher_outputs["own"]
        student = Predictions(
            torch.cat([ours.logits[s] for s, _ in self.layers]),
            torch.cat([ours.boxes[s] for s, _ in self.layers]),
        )
        teacher = Predictions(
            torch.cat([theirs.logits[t] for _, t in self.layers]),
            torch.cat([theirs.boxes[t] for _, t in self.layers]),
        ).detach()
        problem, row, column = assign(pair_costs(student, teacher, self.weights))
        found = distances(student[problem, row], teacher[problem, column]).weighted(self.weights)
        if self.masks.on:
            images = len(step.targets)
            pairs = QueryPairs(problem // images, problem % images, row, column)
            found["mask"] = self.masks.distances(step, ours, theirs, pairs)
        # As many pairs in every image and layer.
        share = len(self.layers) / len(problem)
        return {k: v.sum() * share for k, v in found.items()}

    def _features(self, step: Step) -> Tensor:
        """Masked squared errors, see the head of the file."""
        output = step.teacher_outputs["own"]
        # What the queries look like is the same for all levels.
        queries = [
            good_queries(output, layer, step.targets, self.options.entries)
            for layer in range(len(output.logits))
        ]
        total = []
        for pair in self.maps(step):
            error = (pair.student - pair.teacher).square().mean(1)
            valid = pair.valid[:, 0]
            cells = mean_over_processes(valid.sum().to(torch.float32)).clamp(min=1)
            for mean_query in queries:
                mask = target_mask(mean_query, pair.teacher)
                total.append((mask * error * valid).sum() / cells)
        return torch.stack(total).sum()

    def _prior(self, step: Step) -> dict[str, Tensor]:
        """The detection loss of the teacher's queries under the teacher's assignment."""
        output = step.student_outputs[f"{self.name}/prior"]
        layers, costs, theirs = [s for s, _ in self.layers], self.loss.costs, None
        if self.options.assignment == "teacher":
            numbers = [t for _, t in self.layers]
            theirs = layer_matches(step.teacher_outputs["own"], numbers, step.targets, costs)
        matches = teacher_assigned(output, layers, theirs, step.targets, costs)
        parts = ground_truth_losses(output, step.targets, matches, step.normalizer, self.loss)
        return {f"prior_{k}": self.options.prior_weight * v for k, v in parts.items()}


@torch.no_grad()
def good_queries(output: GroupOutput, layer: int, targets: list[Target], entries: int) -> Tensor:
    """The sum of a layer's queries, each by how good its best entries are, ``[B, D]``.

    Args:
        output: The teacher's own queries.
        layer: Decoder layer.
        targets: Ground truth per image.
        entries: How many (query, class) entries count.
    """
    scores = float32(output.logits[layer]).sigmoid()
    true_boxes, _, _ = pad_targets(targets)  # fillers are empty and overlap nothing
    overlap = scores.new_zeros(scores.shape[:2])
    if true_boxes.shape[1]:
        boxes = cxcywh_to_xyxy(float32(output.boxes[layer]))
        overlap = iou(boxes[:, :, None], cxcywh_to_xyxy(true_boxes)[:, None]).amax(-1)
    best, index = scores.flatten(1).topk(min(entries, scores[0].numel()), dim=1)
    query = torch.div(index, scores.shape[2], rounding_mode="floor")
    # A query's entries share cosine and overlap, so their scores add up.
    quality = torch.zeros_like(overlap).scatter_add_(1, query, best) * overlap
    return torch.einsum("bn,bnd->bd", quality, F.normalize(float32(output.hidden[layer]), dim=-1))


@torch.no_grad()
def target_mask(queries: Tensor, maps: Tensor) -> Tensor:
    """Where a map looks like the teacher's best queries, ``[B, H, W]`` in (0, 1].

    One everywhere in images without objects: no query is good there, so the floor is the maximum.
    The cosines' weighted sum is one product with the weighted sum of the queries.

    Args:
        queries: ``[B, D]``, see :func:`good_queries`.
        maps: ``[B, D, H, W]`` the teacher's.
    """
    mask = torch.einsum("bd,bdhw->bhw", queries, F.normalize(maps, dim=1)).clamp(min=_LEAST)
    return mask / mask.amax((1, 2), keepdim=True)
