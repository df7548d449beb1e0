"""QSKD: knowledge distillation via query selection for detection transformers (2024).

Group query selection (GQS, section 3.2, equation 3): besides the queries matched to an object, the
negative ones whose generalized IoU with some object exceeds tau are worth teaching ("hard"); each
belongs to the object it overlaps most. Attention-guided feature distillation (AGFD, equations 4 to
6): the student's encoder output follows the teacher's where the first decoder layer of the teacher
looks for those queries. Local aligned prediction distillation (LAPD, equation 7): per object the
matched queries are compared, and the hard negatives after an assignment between the two models'
own, so that no 900 x 900 problem has to be solved. The assignment of all queries at once
(``global``) is the paper's rival.

Dense attention (Conditional DETR, DAB-DETR) is the map itself, averaged over heads.
Where the paper is silent: sampled attention is split bilinearly among the cells around each sample
and averaged over heads; one mask spans all levels. The mask is multiplied by the number of cells
(weights average about one): as published it is so small that the variance falls below batch norm's
epsilon and nothing would be normalized. Cells in the padding, and images that select no query, take
no part in statistics or error. The cross-entropy is summed over classes and each layer's loss
divided by its pairs (equation 7 divides by nothing); selection is made anew in every layer; the
weights are those of the detection loss (2/5/2 or 1/5/2). Plain encoder distillation (the first row
of table 5) is the method ``fitnet`` on the memory.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from detr.config import Weight
from detr.models import GroupOutput, Memory, TeacherPart
from detr.models.protocol import WITHOUT_MASKS
from distill.distributed import mean_over_processes, shared_statistic
from distill.methods.base import Method, Setting, align, float32
from distill.methods.parts.attended_cells import attended_map
from distill.methods.parts.mask_pairs import MaskOptions, MaskPairs, QueryPairs
from distill.methods.parts.pairing import LayerMap, pair_decoders, pair_levels, split_levels
from distill.methods.parts.prediction_pairs import PairWeights, Predictions, distances
from distill.methods.parts.query_selection import (
    Alignment,
    Selected,
    Selection,
    flat,
    global_pairs,
    local_pairs,
)
from distill.methods.step import PerStep, Step

_TINY = 1e-6
# Batch norm's own epsilon; with a mask of mean one it is as small as it was meant to be.
_EPSILON = 1e-5


class QskdOptions(MaskOptions):
    """Options of QSKD; the defaults are the complete method at the published values.

    Attributes:
        features: Distil features (AGFD).
        feature_weight: Of AGFD.
        select: Which queries guide both parts: matched ones and hard negatives, or one kind only
            (tables 5 and 6).
        threshold: Tau: a negative is hard above this generalized IoU.
        overlap_weights: Weigh each query's attention with one plus its generalized IoU.
        mask_scale: ``cells`` multiplies the mask by the number of cells, ``none`` leaves it.
        adaptor_layers: Encoder layers put on the student's memory for AGFD only; by default one
            where the student's encoder is shallower than the teacher's, else none.
        predictions: ``local`` (LAPD), ``global`` (all queries assigned at once) or ``off``.
        prediction_weight: Of the whole prediction distillation.
        pool: Hard negatives are assigned per ``box`` or in one pool per ``image``.
        layers: Prediction distillation on ``all`` decoder layers or the ``last``.
        layer_map: Teacher decoder layer (from 0) for each student layer, null for none.
        class_weight, l1_weight, giou_weight: Of LAPD and its assignment; those of the detection
            loss by default.
        mask_weight: Of the masks of the same pairs, which no paper has: :class:`MaskOptions`.
    """

    features: bool = True
    feature_weight: Weight = 50.0
    select: Selection = "positive_hard"
    threshold: Annotated[float, Field(ge=-1e6, le=1e6)] = 0.0
    overlap_weights: bool = True
    mask_scale: Literal["cells", "none"] = "cells"
    adaptor_layers: Annotated[int, Field(ge=0, le=100)] | None = None
    predictions: Literal["local", "global", "off"] = "local"
    prediction_weight: Weight = 1.0
    pool: Literal["box", "image"] = "box"
    layers: Literal["all", "last"] = "all"
    layer_map: LayerMap | None = None
    class_weight: Weight | None = None
    l1_weight: Weight | None = None
    giou_weight: Weight | None = None


@torch.no_grad()
def attention_mask(
    output: GroupOutput, selected: Selected, chosen: Tensor, memory: Memory, overlap_weights: bool
) -> Tensor:
    """The mask W of AGFD, ``[B, S]``: where the chosen queries of the teacher look (section 3.3).

    ``W = mean over the chosen i of (1 + G_i) A_i`` with A_i query i's attention in the first
    decoder layer; zero in images without a chosen query.

    Args:
        output: The teacher's own queries, with attention.
        selected: Of the teacher's last layer, ``L`` = 1.
        chosen: ``[B, N]`` bool.
        memory: The teacher's; gives the level shapes.
        overlap_weights: Whether G counts.
    """
    weights = chosen.to(torch.float32)
    if overlap_weights:
        weights = weights * (1 + selected.overlap[-1].nan_to_num(0.0, 0.0, 0.0))
    weights = weights / chosen.sum(1, keepdim=True).clamp(min=1)
    return attended_map(output.attention[0], memory.shapes, weights)


def normalized(tokens: Tensor, mask: Tensor) -> Tensor:
    """Batch norm without scale and shift over the tokens in the mask, of all processes.

    Args:
        tokens: ``[B, S, D]``.
        mask: ``[B, S]`` bool; the other tokens' values are meaningless.
    """
    # Sums in double: a difference of two means of squares would cancel in single precision.
    part = (tokens * mask[..., None]).double()
    count = mean_over_processes(mask.sum().double()).clamp(min=_TINY)
    mean = shared_statistic(part.sum((0, 1))) / count
    square = shared_statistic(part.square().sum((0, 1))) / count
    variance = (square - mean.square()).clamp(min=0)
    return ((part - mean) / (variance + _EPSILON).sqrt()).to(torch.float32)


class Qskd(Method[QskdOptions]):
    """QSKD (2024): features where the teacher's selected queries look, predictions per object.

    Raises:
        UserError: ``method-levels`` or ``method-layer-map`` where student and teacher cannot be
            paired.
    """

    name: ClassVar[str] = "qskd"

    @classmethod
    def needs(cls, options: QskdOptions) -> frozenset[TeacherPart]:
        """Everything; masks where they are compared."""
        return WITHOUT_MASKS | options.mask_parts

    def __init__(self, options: QskdOptions, setting: Setting) -> None:
        super().__init__(options, setting)
        ours, theirs = setting.student.facts, setting.need_teacher().facts
        self.layers = pair_decoders(ours, theirs, self.options.layer_map, self.name)
        if self.options.layers == "last":
            self.layers = self.layers[-1:]
        off = "predictions: off" if options.predictions == "off" else None
        self.masks = MaskPairs(options, setting, self.layers, self.name, off)
        loss = setting.loss

        def weight(given: float | None, default: float) -> float:
            return default if given is None else given

        self.weights = PairWeights(
            weight(self.options.class_weight, loss.focal),
            weight(self.options.l1_weight, loss.l1),
            weight(self.options.giou_weight, loss.giou),
        )
        self.alignment = Alignment(
            self.options.threshold,
            loss.costs,
            self.weights,
            self.options.select,
            self.options.pool,
        )
        # The teacher's layers whose queries are selected, each once.
        layers = {t for _, t in self.layers} if options.predictions == "local" else set()
        if options.features:
            layers.add(theirs.decoder_layers - 1)
        self.selected_layers = sorted(layers)
        self.teacher_selection = PerStep(self._select_teacher)
        if self.options.features:
            self.levels = pair_levels(ours, theirs, self.name)
            self.align = align(ours.width, theirs.width)
            depth = self.options.adaptor_layers
            if depth is None:
                depth = int(ours.encoder_layers < theirs.encoder_layers)
            self.adaptor = setting.student.encoder_like(depth) if depth else None

    @property
    def needs_attention(self) -> bool:
        """AGFD reads the teacher's cross-attention."""
        return self.options.features

    def losses(self, step: Step) -> dict[str, Tensor]:
        """``features`` (AGFD), and ``class``, ``l1``, ``giou`` and perhaps ``mask`` (LAPD)."""
        losses: dict[str, Tensor] = {}
        if self.options.features:
            losses[f"{self.name}/features"] = self.options.feature_weight * self._features(step)
        if self.options.predictions != "off":
            student = _stacked(step.student_outputs["own"], [s for s, _ in self.layers])
            teacher = _stacked(step.teacher_outputs["own"], [t for _, t in self.layers]).detach()
            if self.options.predictions == "local":
                theirs = self._selected(step, [t for _, t in self.layers])
                pairs = local_pairs(step.targets, student, teacher, self.alignment, theirs)
            else:
                pairs = global_pairs(student, teacher, self.weights)
            parts = self._paired(step, student, teacher, *pairs)
            for key, value in parts.items():
                losses[f"{self.name}/{key}"] = self.options.prediction_weight * value
        return losses

    def _select_teacher(self, step: Step) -> Selected:
        """GQS on the teacher's queries, in the layers anything needs."""
        predictions = _stacked(step.teacher_outputs["own"], self.selected_layers).detach()
        return self.alignment.selection(step.targets, predictions)

    def _selected(self, step: Step, layers: list[int]) -> Selected:
        """The teacher's selected queries of some layers, in their order."""
        places = [self.selected_layers.index(layer) for layer in layers]
        return self.teacher_selection(step).layers(places)

    def _features(self, step: Step) -> Tensor:
        """AGFD (section 3.3): mean squared error of the masked, normalized memories."""
        output, memory = step.teacher_outputs["own"], step.teacher_memory
        assert memory is not None
        selected = self._selected(step, [len(output.logits) - 1])
        chosen = selected.mask(self.options.select)[0]
        mask = attention_mask(output, selected, chosen, memory, self.options.overlap_weights)
        kept = ~memory.padding & chosen.any(1, keepdim=True)
        if self.options.mask_scale == "cells":
            mask = mask * (~memory.padding).sum(1, keepdim=True)
        ours = split_levels(self.align(self._student_tokens(step)), step.student_memory)
        theirs, masks, keeps = (
            split_levels(x, memory) for x in (memory.tokens.detach(), mask, kept)
        )
        student = torch.cat([float32(ours[s]) for s, _ in self.levels], 1)
        teacher = torch.cat([float32(theirs[t]) for _, t in self.levels], 1)
        shared_mask = torch.cat([masks[t] for _, t in self.levels], 1)[..., None]
        shared_kept = torch.cat([keeps[t] for _, t in self.levels], 1)
        error = (
            normalized(teacher * shared_mask, shared_kept)
            - normalized(student * shared_mask, shared_kept)
        ).square()
        count = mean_over_processes(shared_kept.sum().to(torch.float32)).clamp(min=_TINY)
        return (error.mean(-1) * shared_kept).sum() / count

    def _student_tokens(self, step: Step) -> Tensor:
        """The student's memory through the adaptor, if there is one (section 3.5)."""
        memory = step.student_memory
        if self.adaptor is None:
            return memory.tokens
        return self.adaptor.encode(memory.levels()).tokens

    def _paired(
        self,
        step: Step,
        student: Predictions,
        teacher: Predictions,
        rows: Tensor,
        columns: Tensor,
    ) -> dict[str, Tensor]:
        """Loss of the pairs: per layer divided by the layer's pairs, summed over layers."""
        layers, images, queries = student.boxes.shape[:3]
        layer = rows // (images * queries)
        counts = torch.bincount(layer, minlength=layers).to(torch.float32)
        share = 1 / mean_over_processes(counts).clamp(min=_TINY)
        found = distances(flat(student)[rows], flat(teacher)[columns]).weighted(self.weights)
        if self.masks.on:
            image = rows // queries % images
            pairs = QueryPairs(layer, image, rows % queries, columns % teacher.boxes.shape[2])
            outputs = step.student_outputs["own"], step.teacher_outputs["own"]
            found["mask"] = self.masks.distances(step, *outputs, pairs)
        return {k: (v * share[layer]).sum() for k, v in found.items()}


def _stacked(output: GroupOutput, layers: list[int]) -> Predictions:
    """``[L, B, N, ...]`` predictions of some layers."""
    return Predictions(
        torch.stack([output.logits[i] for i in layers]),
        torch.stack([output.boxes[i] for i in layers]),
    )
