"""D3ETR: decoder distillation for detection transformers (2022).

MixMatcher (section 4.1) says which student query answers to which teacher query. Adaptive matching
(equations 5 and 6) assigns the student's own queries to the teacher's by their predictions, anew in
every layer. Fixed matching feeds the teacher's queries to the student as a further group, compared
index by index; that group also learns the ground truth, in the last layer with the teacher's
assignment (equation 7). Then self-attention (equation 8), cross-attention (equation 9) and
predictions (equations 10 and 11) follow the teacher's, in both groups (equation 12).

Where the paper is silent: the cross-entropy is a mean over classes (with mu = 20 that is about the
size of the other terms) and equation 10's sum over queries is divided by their number; attention
maps are softmax weights before dropout, the teacher's re-indexed on both axes without
renormalizing, compared in the mean over all elements. Sampled (deformable) attention is compared as
the dense map it amounts to; cells nobody looks at count in the mean, as there. With several groups
of one kind (table 5), a further adaptive group has learned queries of its own and its own
ground-truth loss, and a further fixed group repeats the first. With softmax scores (DETR) p is the
softmax, "no object" included. Fixed queries of Conditional DETR get their reference point from the
student's own map of their position. Inheriting is the recipe's ``inherit``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from detr.config import Weight
from detr.errors import UserError
from detr.models import (
    DenseAttention,
    Facts,
    GroupOutput,
    LevelShapes,
    QueryGroup,
    SampledAttention,
    TeacherPart,
)
from detr.models.structures import Attention
from distill.losses.linear_assignment import assign
from distill.losses.matches import Matches
from distill.methods.base import Method, Setting, float32
from distill.methods.parts.attended_cells import attended_cells, mean_heads, squared_distance
from distill.methods.parts.attention_error import check_heads, map_error
from distill.methods.parts.mask_pairs import MaskOptions, MaskPairs, QueryPairs
from distill.methods.parts.pairing import LayerMap, Pairs, pair_decoders
from distill.methods.parts.points import ForStudent, check_same_kind, specific_points
from distill.methods.parts.prediction_pairs import PairWeights, Predictions, distances, pair_costs
from distill.methods.parts.teacher_group import (
    ground_truth_losses,
    layer_matches,
    teacher_assigned,
)
from distill.methods.step import PairedGroup, PerStep, Step

_TINY = 1e-6


class D3etrOptions(MaskOptions):
    """Options of D3ETR; the defaults are the complete method at the published values.

    Attributes:
        adaptive: Groups of student queries that are distilled; the first is the student's own.
        fixed: Groups of teacher queries.
        matching: Student queries answer to teacher queries by ``assignment`` or by ``index`` (the
            row "no matching" of table 3).
        ground_truth: The fixed and further adaptive groups also learn the ground truth.
        constraint: Layers in which fixed groups keep the teacher's assignment: ``none``, the
            ``last`` or ``all`` (table 6).
        prediction, self_attention, cross_attention: Switch the parts.
        class_weight, l1_weight, giou_weight: Of the prediction loss and its assignment.
        mask_weight: Of the masks of the same pairs, which no paper has: :class:`MaskOptions`.
        class_mean: The cross-entropy is a mean over classes, else a sum.
        self_weight, cross_weight: Of the attention losses.
        renormalize: Scale the teacher's re-indexed self-attention rows back to one.
        heads: Compare cross-attention for ``each`` head or in their ``mean``.
        layer_map: Teacher decoder layer (from 0) for each student layer, null for none.
    """

    adaptive: Annotated[int, Field(ge=0, le=2)] = 1
    fixed: Annotated[int, Field(ge=0, le=2)] = 1
    matching: Literal["assignment", "index"] = "assignment"
    ground_truth: bool = True
    constraint: Literal["none", "last", "all"] = "last"
    prediction: bool = True
    self_attention: bool = True
    cross_attention: bool = True
    class_weight: Weight = 20.0
    l1_weight: Weight = 5.0
    giou_weight: Weight = 2.0
    class_mean: bool = True
    self_weight: Weight = 10000.0
    cross_weight: Weight = 10000.0
    renormalize: bool = False
    heads: Literal["each", "mean"] = "each"
    layer_map: LayerMap | None = None


# Student and teacher query of every pair, ``[B, n]`` each; None are all of them in their order.
Correspondence = tuple[Tensor | None, Tensor | None]


class D3etr(Method[D3etrOptions]):
    """D3ETR (2022): self-attention, cross-attention and predictions, by two ways of matching.

    Raises:
        UserError: ``method-queries``, ``method-levels``, ``method-heads`` or ``method-layer-map``
            where student and teacher cannot be paired, ``method-attention`` or ``method-scores``
            where their attention or their scores are of different kinds.
    """

    name: ClassVar[str] = "d3etr"
    reads_scores: ClassVar[bool] = False

    @classmethod
    def needs(cls, options: D3etrOptions) -> frozenset[TeacherPart]:
        """Predictions always; queries for fixed groups."""
        needed: set[TeacherPart] = {"predictions"}
        if options.fixed:
            needed.add("queries")
        if options.self_attention or options.cross_attention:
            needed.add("attention")
        return options.mask_parts | needed

    def __init__(self, options: D3etrOptions, setting: Setting) -> None:
        super().__init__(options, setting)
        ours, theirs = setting.student.facts, setting.need_teacher().facts
        self._check(ours, theirs)
        self.layers = pair_decoders(ours, theirs, self.options.layer_map, self.name)
        self.weights = PairWeights(
            self.options.class_weight,
            self.options.l1_weight,
            self.options.giou_weight,
            self.options.class_mean,
        )
        self.loss = setting.loss
        off = None if options.prediction else "prediction: false"
        if not (options.adaptive or options.fixed):
            off = "adaptive: 0 with fixed: 0"
        self.masks = MaskPairs(options, setting, self.layers, self.name, off)
        # Layers in which fixed groups keep the teacher's assignment.
        layers: dict[str, Pairs] = {"none": (), "last": self.layers[-1:], "all": self.layers}
        self.constrained = layers[options.constraint]
        self.teacher_matches = PerStep(self._match_teacher)
        self.fixed_roles = [f"{self.name}/fixed{i + 1}" for i in range(self.options.fixed)]
        self.adaptive_roles = ["own", f"{self.name}/adaptive2"][: self.options.adaptive]
        if self.fixed_roles:
            self.for_student = ForStudent(ours, theirs)
        if self.options.adaptive > 1:
            # Where a detector learns its content this is a second table; two-stage queries get
            # theirs from the proposals, on top of which the table is added.
            self.content = nn.Embedding(ours.num_queries, ours.width)
            if ours.query_start == "points":
                self.position = nn.Embedding(ours.num_queries, ours.width)

    def _check(self, ours: Facts, theirs: Facts) -> None:
        dense = [facts.attention != "deformable" for facts in (ours, theirs)]
        if self.options.cross_attention and dense[0] != dense[1]:
            raise UserError(
                "method-attention",
                f"methods.{self.name}: the student's attention is {ours.attention} and the "
                f"teacher's {theirs.attention}, whose maps are not alike; set "
                "cross_attention: false",
            )
        if ours.scores != theirs.scores:
            raise UserError(
                "method-scores",
                f"methods.{self.name}: the student's scores are {ours.scores} and the "
                f"teacher's {theirs.scores}; they must agree",
            )
        if self.options.fixed:
            check_same_kind(ours, theirs, self.name)
        if self.options.cross_attention and ours.strides != theirs.strides:
            raise UserError(
                "method-levels",
                f"methods.{self.name}: cross-attention needs equal levels, but the student has "
                f"strides {list(ours.strides)} and the teacher {list(theirs.strides)}; set "
                "cross_attention: false",
            )
        if self.options.self_attention:
            check_heads(self.name, "self", ours.heads, theirs.heads, "self_attention: false")
        if self.options.cross_attention and self.options.heads == "each":
            check_heads(self.name, "cross", ours.cross_heads, theirs.cross_heads, "heads: mean")
        if self.options.matching == "index" and ours.num_queries > theirs.num_queries:
            raise UserError(
                "method-queries",
                f"methods.{self.name}: matching: index needs at least as many teacher queries "
                f"({theirs.num_queries}) as student queries ({ours.num_queries})",
            )

    @property
    def needs_attention(self) -> bool:
        """Whether cross-attention is distilled."""
        return self.options.cross_attention

    @property
    def self_attention(self) -> frozenset[str]:
        """The distilled groups; the teacher's is its own."""
        if not self.options.self_attention:
            return frozenset()
        return frozenset({"own", *self.adaptive_roles, *self.fixed_roles})

    def groups(self, step: Step) -> list[PairedGroup]:
        """The fixed groups and the second adaptive one, for the student only."""
        assert step.teacher is not None
        groups = []
        for role in self.fixed_roles:
            group = specific_points(role, step.teacher_groups[0], step.teacher.facts)
            group = self.for_student(group)
            if group.position is not None and step.student.facts.attention == "conditional":
                group.reference = step.student.reference_of(group.position)
            groups.append(PairedGroup(role, group, None))
        for role in self.adaptive_roles[1:]:
            groups.append(PairedGroup(role, self._second(role, step), None))
        return groups

    def _second(self, role: str, step: Step) -> QueryGroup:
        """Student queries with learned halves of their own, from the student's anchors."""
        own = step.student_groups[0]
        content = self.content.weight[None].expand(len(own.content), -1, -1)
        if step.student.facts.query_start == "points":
            position = self.position.weight[None].expand_as(content)
            reference = step.student.reference_of(position)
            return QueryGroup(role, content, reference, position)
        if own.position is not None:
            content = own.content + content
        return replace(own, role=role, content=content, proposals=None)

    def losses(self, step: Step) -> dict[str, Tensor]:
        """Per group ``class``, ``l1``, ``giou``, ``self``, ``cross`` and, off the own, ``gt_*``.

        With ``mask_weight`` also ``mask``.
        """
        losses: dict[str, Tensor] = {}
        teacher = step.teacher_outputs["own"]
        for role in (*self.adaptive_roles, *self.fixed_roles):
            output = step.student_outputs[role]
            short = f"{self.name}/{role.removeprefix(f'{self.name}/')}"
            by_index = role in self.fixed_roles or self.options.matching == "index"
            for key, value in self._distill(step, output, teacher, by_index).items():
                losses[f"{short}_{key}"] = value
            if self.options.ground_truth and role != "own":
                for key, value in self._ground_truth(step, role, output).items():
                    losses[f"{short}_gt_{key}"] = value
        return losses

    def _ground_truth(self, step: Step, role: str, output: GroupOutput) -> dict[str, Tensor]:
        layers = self.constrained if role in self.fixed_roles else ()
        theirs = self.teacher_matches(step) if layers else None
        numbers = [s for s, _ in layers]
        matches = teacher_assigned(output, numbers, theirs, step.targets, self.loss.costs)
        return ground_truth_losses(output, step.targets, matches, step.normalizer, self.loss)

    def _match_teacher(self, step: Step) -> Matches:
        """The teacher's assignment in the constrained layers, in their order."""
        layers = [t for _, t in self.constrained]
        return layer_matches(step.teacher_outputs["own"], layers, step.targets, self.loss.costs)

    def _distill(
        self, step: Step, student: GroupOutput, teacher: GroupOutput, by_index: bool
    ) -> dict[str, Tensor]:
        """Equations 8 to 11 for one group."""
        options = self.options
        parts: dict[str, list[Tensor]] = {}
        pairs = self._correspondence(student, teacher, by_index)
        for index, ((s, t), pair) in enumerate(zip(self.layers, pairs, strict=True)):
            if options.prediction:
                ours = _taken(_predictions(student, [s]), pair[0])
                theirs = _taken(_predictions(teacher, [t]), pair[1])
                found = distances(ours, theirs, options.class_mean).weighted(self.weights)
                for key, value in found.items():
                    parts.setdefault(key, []).append(value.mean())
                if self.masks.on:
                    queries = _query_pairs(index, pair, student.boxes[s])
                    apart = self.masks.distances(step, student, teacher, queries)
                    parts.setdefault("mask", []).append(apart.mean())
            if options.self_attention:
                maps = (student.self_attention[s], teacher.self_attention[t])
                error = self._self_error(*maps, pair)
                parts.setdefault("self", []).append(options.self_weight * error)
            if options.cross_attention:
                looks = student.attention[s], teacher.attention[t]
                error = self._cross_error(*looks, pair, step.student_memory.shapes)
                parts.setdefault("cross", []).append(options.cross_weight * error)
        return {key: torch.stack(values).sum() for key, values in parts.items()}

    def _correspondence(
        self, student: GroupOutput, teacher: GroupOutput, by_index: bool
    ) -> list[Correspondence]:
        """Pairs of every compared layer (equation 6)."""
        batch, queries = student.boxes[0].shape[:2]
        if by_index:
            if queries == teacher.boxes[0].shape[1]:
                return [(None, None)] * len(self.layers)
            index = torch.arange(queries, device=student.boxes[0].device).expand(batch, -1)
            return [(None, index)] * len(self.layers)
        ours = _predictions(student, [s for s, _ in self.layers])
        theirs = _predictions(teacher, [t for _, t in self.layers])
        _, row, column = assign(pair_costs(ours, theirs, self.weights))
        shape = (len(self.layers), batch, -1)
        theirs_of = column.reshape(shape)
        if (
            queries <= teacher.boxes[0].shape[1]
        ):  # every query has a partner, and they come in order
            return [(None, theirs_of[i]) for i in range(len(theirs_of))]
        return list(zip(row.reshape(shape), theirs_of, strict=True))

    def _self_error(self, ours: Tensor, theirs: Tensor, pair: Correspondence) -> Tensor:
        """Mean squared error of ``[B, M, N, N]`` maps (equation 8), the teacher's re-indexed."""
        ours = _submap(float32(ours), pair[0])
        return map_error(ours, float32(theirs).detach(), pair[1], self.options.renormalize)

    def _cross_error(
        self,
        ours: Attention,
        theirs: Attention,
        pair: Correspondence,
        shapes: LevelShapes,
    ) -> Tensor:
        """Mean squared error of the maps ``[B, M, N, S]``, or what samples amount to (eq. 9)."""
        if isinstance(ours, DenseAttention) and isinstance(theirs, DenseAttention):
            return self._dense_error(float32(ours.weights), float32(theirs.weights), pair)
        assert isinstance(ours, SampledAttention) and isinstance(theirs, SampledAttention)
        theirs = replace(
            theirs, locations=theirs.locations.detach(), weights=theirs.weights.detach()
        )
        first, second = (
            attended_cells(_rows(a, q), shapes) for a, q in zip((ours, theirs), pair, strict=True)
        )
        if self.options.heads == "mean":
            first, second = mean_heads(first), mean_heads(second)
        elements = first.index.shape[:-1].numel() * first.size
        return squared_distance(first, second) / elements

    def _dense_error(self, ours: Tensor, theirs: Tensor, pair: Correspondence) -> Tensor:
        """Mean squared error of ``[B, M, N, S]`` maps, the teacher's rows re-indexed."""
        ours, theirs = (_map_rows(m, q) for m, q in zip((ours, theirs), pair, strict=True))
        if self.options.heads == "mean":
            ours, theirs = ours.mean(1), theirs.mean(1)
        return F.mse_loss(ours, theirs.detach())


def _predictions(output: GroupOutput, layers: list[int]) -> Predictions:
    """``[layers * B, N, ...]``; their sigmoids are the output's scores, softmax or not."""
    logits = torch.cat([output.logits[i] for i in layers])
    if output.no_object:
        log_p = float32(logits).log_softmax(-1).clamp(max=-_TINY)
        logits = log_p - (-log_p.expm1()).log()  # the sigmoid of this is the softmax
    return Predictions(logits, torch.cat([output.boxes[i] for i in layers]))


def _taken(predictions: Predictions, queries: Tensor | None) -> Predictions:
    """The predictions of the given queries, ``[B, n, ...]``."""
    if queries is None:
        return predictions
    image = torch.arange(len(queries), device=queries.device)[:, None]
    return predictions[image, queries]


def _query_pairs(layer: int, pair: Correspondence, boxes: Tensor) -> QueryPairs:
    """Corresponding queries of a layer pair in a row; ``boxes`` are the student's."""
    every = torch.arange(boxes.shape[1], device=boxes.device).expand(len(boxes), -1)
    ours, theirs = (every if queries is None else queries for queries in pair)
    image = torch.arange(len(ours), device=ours.device)[:, None].expand_as(ours).flatten()
    return QueryPairs(torch.full_like(image, layer), image, ours.flatten(), theirs.flatten())


def _map_rows(attention: Tensor, queries: Tensor | None) -> Tensor:
    """``[B, M, n, S]`` rows of the given queries ``[B, n]``."""
    if queries is None:
        return attention
    index = queries[:, None, :, None].expand(-1, attention.shape[1], -1, attention.shape[3])
    return attention.gather(2, index)


def _submap(attention: Tensor, queries: Tensor | None) -> Tensor:
    """``[B, M, n, n]`` rows and columns of the given queries ``[B, n]``."""
    if queries is None:
        return attention
    # Image by image, whole rows first: copying rows costs a fraction of gathering elements.
    return torch.stack([m[:, q][:, :, q] for m, q in zip(attention, queries, strict=True)])


def _rows(sampled: SampledAttention, queries: Tensor | None) -> SampledAttention:
    """The samples of the given queries ``[B, n]``."""
    if queries is None:
        return sampled
    image = torch.arange(len(queries), device=queries.device)[:, None]
    chosen = (image, queries)
    return replace(sampled, locations=sampled.locations[chosen], weights=sampled.weights[chosen])
