"""Distillation points: queries both models answer, and how their answers are compared.

KD-DETR's idea: models whose own queries mean different things are compared on *shared* queries.
Shared means the same content and the same reference; a width that differs is bridged by a learned
linear map on the student's side. Queries of learned kind also share the position, the others make
theirs from the reference, each with its own layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from detr.errors import UserError
from detr.models import Facts, GroupOutput, QueryGroup, Target, Teacher, cxcywh_to_xyxy
from detr.models.boxes import LOGIT_EPS
from detr.models.layers import MLP
from distill.losses.overlap import giou
from distill.losses.targets import pad_targets
from distill.methods.base import align, float32
from distill.methods.parts.pairing import Pairs

_SEED = 20240607
Scores = Literal["sigmoid", "softmax"]


def check_same_kind(student: Facts, teacher: Facts, method: str) -> None:
    """Raises UserError ``method-queries`` where the models cannot take each other's queries."""
    if student.query_start != teacher.query_start:
        raise UserError(
            "method-queries",
            f"methods.{method}: the student's queries start from {student.query_start} and the "
            f"teacher's from {teacher.query_start}, so none can be shared; learned queries start "
            "from points, all others from boxes",
        )


class ForStudent(nn.Module):
    """Turns a teacher's query group into the same group for the student."""

    def __init__(self, student: Facts, teacher: Facts) -> None:
        super().__init__()
        self.content = align(teacher.width, student.width)
        learned = teacher.query_start == "points"
        self.position = align(teacher.width, student.width) if learned else nn.Identity()

    def forward(self, group: QueryGroup) -> QueryGroup:
        """The group with content and position in the student's width."""
        position = None if group.position is None else self.position(group.position)
        return replace(group, content=self.content(group.content), position=position)


def general_points(
    role: str, own: QueryGroup, count: int, facts: Facts, generator: torch.Generator
) -> QueryGroup:
    """Random queries, new in every step (KD-DETR), the same for all images.

    The logits of the references are N(0, 1). So is the content of models that learn theirs; queries
    of Conditional DETR and DAB-DETR begin without any content, and so do these. Learned queries get
    a random position, too.

    Args:
        role: Of the group.
        own: The teacher's own queries.
        count: Number of queries.
        facts: Of the teacher.
        generator: On the CPU and seeded alike in every process, so that all ask the same.
    """
    learned = facts.query_start == "points"

    def normal(channels: int) -> Tensor:
        drawn = torch.randn(1, count, channels, generator=generator)
        on_device = drawn.to(own.content.device, non_blocking=True)
        return on_device.expand(len(own.content), -1, -1)

    if facts.blank_content:
        content = own.content[:, :1].detach().expand(-1, count, -1)
    else:
        content = normal(facts.width)
    return QueryGroup(
        role,
        content=content,
        reference=normal(2 if learned else 4).sigmoid(),
        position=normal(facts.width) if learned else None,
    )


def specific_points(role: str, own: QueryGroup, facts: Facts) -> QueryGroup:
    """The teacher's own queries (KD-DETR), for the student.

    With two-stage teachers these are the anchors the teacher chose on this image, detached.
    """
    position = own.position if facts.query_start == "points" else None
    return QueryGroup(
        role,
        content=own.content.detach(),
        reference=own.reference.detach(),
        position=None if position is None else position.detach(),
    )


class TargetAware(nn.Module):
    """Queries that stand on the ground truth (CLoCKDistill equations 6 to 8), frozen.

    The content of class c is the teacher's label embedding where it was trained with denoising
    queries, else row c of a fixed random N(0, 1) table. The reference is the true box. Models with
    box references make the position from it with their own layers; learned queries start from the
    box's center and take the position from a fixed random MLP of the box. The paper does not say
    where its embedding and MLP get their values.

    Args:
        teacher: Whose embedding is taken (a copy).
        copies: How often each box is asked about.
        jitter: Scale of the noise on all copies but the first, in DN-DETR's terms (center and size
            move by up to ``jitter`` half sizes and sizes); 0 repeats the box.
    """

    def __init__(self, teacher: Teacher, copies: int, jitter: float) -> None:
        super().__init__()
        self.copies, self.jitter = copies, jitter
        facts = teacher.facts
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            table = torch.randn(facts.num_classes, facts.width)
            mlp = MLP(4, facts.width, facts.width, facts.width)
        if (contents := teacher.class_contents()) is not None:
            table = contents.detach().clone()
        self.content: Tensor
        self.register_buffer("content", table)
        self.position = mlp.requires_grad_(False) if facts.query_start == "points" else None

    @torch.no_grad()
    def forward(
        self, role: str, targets: Sequence[Target], generators: Sequence[torch.Generator]
    ) -> QueryGroup:
        """The group of a batch: ``copies`` times the largest box count, at least one query.

        Images with fewer boxes, or none, are filled up with padding.
        """
        boxes, labels, counts = pad_targets(targets)
        most = max(1, boxes.shape[1])
        padding = (torch.arange(most) >= counts[:, None]).to(boxes.device, non_blocking=True)
        filled = boxes.new_full((len(targets), most, 4), 0.5)
        filled[:, : boxes.shape[1]] = boxes
        classes = labels.new_zeros((len(targets), most))
        classes[:, : labels.shape[1]] = labels
        reference = self._references(filled, counts.tolist(), generators)
        return QueryGroup(
            role,
            content=self.content[classes].repeat(1, self.copies, 1),
            reference=reference if self.position is None else reference[..., :2],
            position=None if self.position is None else self.position(reference),
            padding=padding.repeat(1, self.copies),
        )

    def _references(
        self, boxes: Tensor, counts: Sequence[int], generators: Sequence[torch.Generator]
    ) -> Tensor:
        """``[B, copies * G, 4]``: the boxes, then their further copies."""
        further = boxes[:, None].repeat(1, self.copies - 1, 1, 1)
        if self.jitter:
            noise = torch.zeros(further.shape)
            for row, count, generator in zip(noise, counts, generators, strict=True):
                shape = (self.copies - 1, count, 4)
                row[:, :count] = 2 * torch.rand(shape, generator=generator) - 1
            reach = torch.cat((further[..., 2:] / 2, further[..., 2:]), -1)
            further = further + self.jitter * noise.to(boxes.device) * reach
        return torch.cat((boxes, further.flatten(1, 2)), 1).clamp(LOGIT_EPS, 1 - LOGIT_EPS)


@dataclass
class AnswerDistances:
    """How far a student's answers are from a teacher's; ``[L, B, N]`` each, L layer pairs.

    Attributes:
        kl: Temperature-scaled Kullback-Leibler divergence, summed over classes.
        l1: Distance of the boxes, summed over the four coordinates.
        giou: One minus their generalized IoU.
        confidence: The teacher's best class score; zero for padding. No gradient.
    """

    kl: Tensor
    l1: Tensor
    giou: Tensor
    confidence: Tensor


def answer_distances(
    student: GroupOutput,
    teacher: GroupOutput,
    pairs: Pairs,
    temperature: float,
    scores: Scores = "sigmoid",
) -> AnswerDistances:
    """Compares the answers of both models to the same queries, in float32.

    Args:
        student: Gets the gradient.
        teacher: Of a group of the same queries; gets none.
        pairs: (student, teacher) decoder layers.
        temperature: Of the class distributions.
        scores: What the confidence is the best of.
    """
    logits = torch.stack([student.logits[s] for s, _ in pairs])
    boxes = float32(torch.stack([student.boxes[s] for s, _ in pairs]))
    their_logits = float32(torch.stack([teacher.logits[t] for _, t in pairs])).detach()
    their_boxes = float32(torch.stack([teacher.boxes[t] for _, t in pairs])).detach()
    ranked = their_logits.sigmoid() if scores == "sigmoid" else their_logits.softmax(-1)
    confidence = ranked.amax(-1)
    if student.group.padding is not None:
        confidence = confidence.masked_fill(student.group.padding, 0.0)
    return AnswerDistances(
        kl_divergence(logits, their_logits, temperature),
        (boxes - their_boxes).abs().sum(-1),
        1 - giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(their_boxes)),
        confidence,
    )


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T^2 * KL(softmax(teacher / T) || softmax(student / T))`` over the last axis.

    The factor keeps the size of the gradient independent of T (Hinton et al. 2015, section 2). The
    softmax over a single class says nothing, so with one class the two outcomes "class" and "none"
    of its sigmoid are compared.

    Args:
        student: ``[..., K]`` logits.
        teacher: ``[..., K]`` logits.
        temperature: T.

    Returns:
        ``[...]`` float32.
    """
    ours, theirs = float32(student), float32(teacher)
    if ours.shape[-1] == 1:
        ours = torch.cat((ours, torch.zeros_like(ours)), -1)
        theirs = torch.cat((theirs, torch.zeros_like(theirs)), -1)
    log_p = (theirs / temperature).log_softmax(-1)
    log_q = (ours / temperature).log_softmax(-1)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)
