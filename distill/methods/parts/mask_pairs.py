"""Masks of pairs of predictions: what every method that distils predictions may add for masks.

None of the papers has masks, so there is no formula of theirs: a pair that a method compares by
class and box is compared by mask as well, with the weight that its boxes have in the method. Who is
paired with whom stays as published, by classes and boxes.

Both masks are sampled at the same points of the image, whatever the resolution and width of either
model's map. The points are where the student's mask is least sure, as in the detection loss
(:mod:`distill.losses.masks`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from detr.config import Strict, Weight
from detr.errors import UserError
from detr.models import GroupOutput, TeacherPart
from distill.losses.masks import (
    CHUNK,
    MaskPredictions,
    Points,
    masks_of,
    sampled,
    uncertain_points,
)
from distill.methods.base import Setting
from distill.methods.parts.pairing import Pairs
from distill.methods.step import Step


class MaskOptions(Strict):
    """What methods that distil predictions say of masks.

    Attributes:
        mask_weight: Of the distance between the masks of a pair (:func:`divergence`); 0 leaves
            masks alone, which is what the papers do.
    """

    mask_weight: Weight = 0.0

    @property
    def mask_parts(self) -> frozenset[TeacherPart]:
        """What is read of the teacher for them."""
        return frozenset({"masks"}) if self.mask_weight else frozenset()


@dataclass(frozen=True)
class QueryPairs:
    """Student and teacher queries that are compared, R of them, ``[R]`` each.

    Attributes:
        layer: Index of the (student, teacher) pair of decoder layers.
        image: Of the batch.
        student, teacher: The query in its model.
    """

    layer: Tensor
    image: Tensor
    student: Tensor
    teacher: Tensor


class MaskPairs:
    """The mask term of a method.

    Args:
        options: Of the method.
        setting: Of the method.
        layers: (student, teacher) decoder layers that it compares.
        method: Its name, for messages.
        off: What switches off the part that the term belongs to, where it is off.

    Raises:
        UserError: ``method-masks`` where the term is asked for and the student has no masks, or no
            predictions are distilled. (A teacher without is refused for what it offers.)
    """

    def __init__(
        self,
        options: MaskOptions,
        setting: Setting,
        layers: Pairs,
        method: str,
        off: str | None = None,
    ) -> None:
        self.weight = options.mask_weight
        self.on = self.weight > 0
        self.layers = layers
        self.points = setting.loss.mask_points
        if self.on and not setting.student.facts.masks:
            raise UserError(
                "method-masks",
                f"methods.{method}.mask_weight: the student has no masks; heads.masks gives it "
                "some",
            )
        if self.on and off is not None:
            raise UserError(
                "method-masks",
                f"methods.{method}.mask_weight: goes with predictions, and {off} distils none",
            )

    def distances(
        self, step: Step, student: GroupOutput, teacher: GroupOutput, pairs: QueryPairs
    ) -> Tensor:
        """Weighted :func:`divergence` of the masks of pairs, ``[R]``.

        Args:
            step: Gives the points' random numbers.
            student: Answers to a group; get the gradient.
            teacher: Answers to a group; get none.
            pairs: Of the two groups' queries.
        """
        points = Points(self.points, step.generators)
        ours, theirs = (masks_of(output, points, first=False) for output in (student, teacher))
        assert ours is not None and theirs is not None
        numbers = torch.tensor(self.layers, device=pairs.layer.device)[pairs.layer]
        found, order = [0.0 * ours.queries.sum()[None][:0]], [pairs.image[:0]]
        for image in range(len(student.boxes[0])):
            for part in torch.split((pairs.image == image).nonzero()[:, 0], CHUNK):
                if len(part) == 0:
                    continue
                own, other = numbers[part].unbind(1)
                logits = (
                    ours.logits(image, own, pairs.student[part]),
                    theirs.logits(image, other, pairs.teacher[part]).detach(),
                )
                found.append(_at_points(logits, (ours, theirs), points, image))
                order.append(part)
        place = torch.cat(order).argsort()
        return self.weight * torch.cat(found)[place]

    def of_same_queries(
        self, step: Step, student: GroupOutput, teacher: GroupOutput, weights: Tensor
    ) -> Tensor:
        """:meth:`distances` where both models answered the same queries, ``[L, B, N]``.

        Args:
            step: See :meth:`distances`.
            student: See :meth:`distances`.
            teacher: See :meth:`distances`.
            weights: ``[L, B, N]`` of the layer pairs; where one is 0, nothing is computed and the
                distance is 0.
        """
        layer, image, query = weights.nonzero().unbind(1)
        found = self.distances(step, student, teacher, QueryPairs(layer, image, query, query))
        every = found.new_zeros(weights.shape)
        return every.index_put((layer, image, query), found)


def _at_points(
    logits: tuple[Tensor, Tensor],
    masks: Sequence[MaskPredictions],
    points: Points,
    image: int,
) -> Tensor:
    """:func:`divergence` of some of an image's masks, ``[M, h, w]`` each, ``[M]``."""
    extents = [one.pixels.extent[image] for one in masks]
    places = uncertain_points(logits[0], extents[0], points, image)
    told, goal = (
        sampled(x[:, None], places, extent)[:, 0] for x, extent in zip(logits, extents, strict=True)
    )
    return divergence(told, goal)


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """How far masks are from others at points: cross-entropy and dice, 0 where they are the same.

    The cross-entropy is taken to the teacher's probabilities q, less what it is for q itself, which
    changes no gradient. Dice has squares below its line, ``1 - (2 pq + 1) / (p² + q² + 1)`` summed
    over points (Milletari et al. 2016): for masks of zeros and ones it is the detection loss's, and
    between probabilities it is least where they agree, which that one is not.

    Args:
        student: ``[M, P]`` logits.
        teacher: ``[M, P]`` logits.

    Returns:
        ``[M]``, the sum of both.
    """
    q = teacher.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(student, q, reduction="none")
    own = F.binary_cross_entropy_with_logits(teacher, q, reduction="none")
    p = student.sigmoid()
    apart = (p - q).square().sum(1)
    dice = apart / (p.square().sum(1) + q.square().sum(1) + 1)
    return (entropy - own).mean(1) + dice
