"""Stable-DINO: detection transformer with stable matching (ICCV 2023). Needs no teacher.

Position-supervised loss (section 2.2, equation 3): a matched query's score is trained towards a
function f1 of its IoU with the box, not towards one. Position-modulated cost (section 2.3, equation
4): matching multiplies a query's score with a function f2 of its rescaled generalized IoU.

Departures between paper and released code, each with its switch: equation 3 has no alpha, the code
weighs positives with 0.25 and the rest with 0.75 (done here). The paper rescales f1 so that an
image's highest target is the highest IoU of any of its pairs (better with 900 queries), the code so
that it is 1 (``rescale``). The code looks positional scores up by class, so that of several boxes
of one class in the whole batch only the last counts (``class_scatter``); the paper does it pair by
pair. The code also supervises denoising queries this way, at class weight 1 (``denoising``). The
L1 and GIoU weights and those of the cost are the recipe's, as are the masks' of Stable-MaskDINO
(section 4.3), for which there is no released code: it is this method on Mask DINO. Memory fusion
belongs to the encoder and suppression of duplicates to the evaluation (``detector.nms``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from detr.config import Strict, Weight
from detr.models import Target, cxcywh_to_xyxy
from distill.losses.answers import Answers, answers
from distill.losses.costs import ALPHA, GAMMA, MatchingCosts, pair_terms
from distill.losses.detection import denoising_matches, one_to_many_losses, proposal_targets
from distill.losses.groups import group_count, group_losses
from distill.losses.masks import MaskPredictions, Points, proposed_masks
from distill.losses.matcher import match_costs
from distill.losses.matches import Matches
from distill.losses.overlap import giou, iou
from distill.losses.sets import ignored, matched_losses, set_losses, weighted
from distill.losses.targets import JoinedTargets, pad_targets, pair_iou
from distill.losses.weights import LossWeights
from distill.methods.base import Method, Setting, float32
from distill.methods.step import Step
from distill.profiler import timed

F1 = Literal["1", "s^0.5", "s", "s^2", "s^3", "s*p^0.25", "s*p", "s^2*p", "exp", "sin"]
Rescale = Literal["one", "max_iou", "none"]


class StableDinoOptions(Strict):
    """Options of Stable-DINO; the defaults are the released code's.

    Attributes:
        target: f1 of table 7, of the IoU s and the score p; ``exp`` is (e^s - 1) / (e - 1), ``sin``
            is sin(s * pi / 2), ``1`` the ordinary focal loss.
        rescale: The highest target of an image becomes ``one`` or its highest IoU (``max_iou``),
            never less than it is; or stays (``none``).
        cost_exponent: f2(s') = s' to this power (table 9); 0 leaves the cost alone.
        cost_rescale: The highest s' of an image becomes 1.
        class_scatter: Look s' up by class over the whole batch, as the released code does.
        class_weight: Of the class loss of own queries and proposals (table 8).
        denoising: ``stable`` supervises denoising queries alike, ``focal`` as usual.
        denoising_class_weight: Of their class loss.
    """

    target: F1 = "s^2"
    rescale: Rescale = "one"
    cost_exponent: Weight = 0.5
    cost_rescale: bool = True
    class_scatter: bool = False
    class_weight: Weight = 6.0
    denoising: Literal["stable", "focal"] = "stable"
    denoising_class_weight: Weight = 1.0


def positional_target(name: F1, s: Tensor, p: Tensor) -> Tensor:
    """f1 of table 7."""
    if name == "1":
        return torch.ones_like(s)
    if name == "exp":
        return (s.exp() - 1) / (math.e - 1)
    if name == "sin":
        return (s * (math.pi / 2)).sin()
    exponents = {
        "s^0.5": (0.5, 0.0),
        "s": (1.0, 0.0),
        "s^2": (2.0, 0.0),
        "s^3": (3.0, 0.0),
        "s*p^0.25": (1.0, 0.25),
        "s*p": (1.0, 1.0),
        "s^2*p": (2.0, 1.0),
    }
    a, b = exponents[name]
    result: Tensor = s**a * p**b
    return result


@torch.no_grad()
def rescaled(
    goal: Tensor, matches: Matches, boxes: Tensor, targets: Sequence[Target], rule: Rescale
) -> Tensor:
    """Raises the targets of every layer and image so that the highest reaches the rule's mark.

    Args:
        goal: ``[M]`` of the matched pairs.
        matches: The pairs.
        boxes: ``[L, B, N, 4]`` cx cy w h of all predictions.
        targets: Ground truth per image.
        rule: See :class:`StableDinoOptions`.
    """
    if rule == "none" or not len(goal):
        return goal
    layers, images = boxes.shape[:2]
    place = matches.layer * images + matches.image
    highest = goal.new_zeros(layers * images).scatter_reduce(0, place, goal, "amax")
    mark = torch.ones_like(highest)
    if rule == "max_iou":
        true_boxes, _, _ = pad_targets(targets)  # fillers are empty and overlap nothing
        table = iou(
            cxcywh_to_xyxy(float32(boxes))[..., None, :], cxcywh_to_xyxy(true_boxes)[None, :, None]
        )
        mark = table.flatten(2).amax(-1).flatten()
    return goal * (mark / (highest + 1e-8)).clamp(min=1)[place]


def position_supervised(
    logits: Tensor,
    boxes: Tensor,
    targets: Sequence[Target],
    matches: Matches,
    f1: F1,
    rescale: Rescale,
    padding: Tensor | None = None,
) -> Tensor:
    """Equation 3 with alpha, summed; ``[L, B, N, K]`` logits, a scalar comes back."""
    logits = float32(logits)
    truth = JoinedTargets.of(targets)
    entry = (matches.layer, matches.image, matches.query, truth.of_pairs(matches)[1])
    score = logits.detach().sigmoid()[entry]
    goal = positional_target(f1, pair_iou(boxes, matches, truth), score)
    goal = rescaled(goal, matches, boxes, targets, rescale)
    positive = logits[entry]
    error = (goal - positive.sigmoid()).abs() ** GAMMA
    entropy = F.binary_cross_entropy_with_logits(positive, goal, reduction="none")
    rest = (1 - ALPHA) * logits.sigmoid() ** GAMMA * F.softplus(logits)
    silent = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
    if any(len(target.ignore) for target in targets):
        region = ignored(boxes, targets)
        region[matches.layer, matches.image, matches.query] = False
        silent |= region[..., None]
    if padding is not None:
        silent |= padding[None, ..., None]
    silent[entry] = True
    return (ALPHA * error * entropy).sum() + rest.masked_fill(silent, 0.0).sum()


@timed("matching")
@torch.no_grad()
def modulated_cost(
    logits: Tensor,
    boxes: Tensor,
    targets: Sequence[Target],
    costs: MatchingCosts,
    exponent: float,
    rescale: bool,
    class_scatter: bool,
    masks: MaskPredictions | None = None,
) -> Tensor:
    """Matching cost ``[L, B, N, G]`` with equation 4's class term."""
    terms = pair_terms(logits, boxes, targets, masks=masks)
    if exponent == 0 or terms.giou.shape[-1] == 0:
        return costs.of_terms(terms)
    if class_scatter:
        position = _scattered(boxes, targets, rescale)
    else:
        position = (terms.giou + 1) / 2
        if rescale:
            counts = torch.tensor([len(target.labels) for target in targets])
            present = (torch.arange(terms.giou.shape[-1]) < counts[:, None]).to(
                boxes.device, non_blocking=True
            )
            position = _to_one(position, position * present[None, :, None])
    score = terms.score * position.clamp(0, 1) ** exponent
    return costs.of_terms(replace(terms, score=score))


def _to_one(position: Tensor, counted: Tensor) -> Tensor:
    """Raises ``[L, B, N, ...]`` so that each image's highest counted value is 1."""
    highest = counted.flatten(2).amax(-1)[..., None, None]
    return position * (1 / (highest + 1e-8)).clamp(min=1)


def _scattered(boxes: Tensor, targets: Sequence[Target], rescale: bool) -> Tensor:
    """Positional scores against the last box of each class in the batch, ``[L, B, N, G]``."""
    truth = JoinedTargets.of(targets)
    classes, place = torch.unique(truth.labels, return_inverse=True)
    number = torch.arange(len(place), device=place.device)
    last = torch.zeros_like(classes).scatter_reduce(0, place, number, "amax", include_self=False)
    table = giou(cxcywh_to_xyxy(float32(boxes))[..., None, :], cxcywh_to_xyxy(truth.boxes[last]))
    table = (table + 1) / 2
    if rescale:
        table = _to_one(table, table)
    _, labels, _ = pad_targets(targets)
    column = torch.searchsorted(classes, labels).clamp(max=len(classes) - 1)
    layers, _, queries = boxes.shape[:3]
    return table.gather(-1, column[None, :, None].expand(layers, -1, queries, -1))


class StableDino(Method[StableDinoOptions]):
    """Stable-DINO (ICCV 2023): scores learn the IoU, matching prefers well-placed boxes."""

    name: ClassVar[str] = "stable_dino"
    teacher: ClassVar[Literal["none", "frozen", "ema"]] = "none"
    replaces_detection_loss: ClassVar[bool] = True

    def __init__(self, options: StableDinoOptions, setting: Setting) -> None:
        super().__init__(options, setting)
        self.loss = setting.loss
        self.weights = self._weights(self.options.class_weight)
        self.noisy_weights = self._weights(self.options.denoising_class_weight)

    def _weights(self, focal: float) -> LossWeights:
        return self.loss.model_copy(update={"focal": focal})

    def losses(self, step: Step) -> dict[str, Tensor]:
        """Nothing beside the detection loss."""
        return {}

    def detection_losses(self, step: Step) -> dict[str, Tensor]:
        """``own/...``, ``proposals/...``, ``denoising/...``; others as usual."""
        own, points = step.student_outputs["own"], Points(self.loss.mask_points, step.generators)
        losses = weighted(
            "own", self._matched(answers(own, points), step.targets, step), self.weights
        )
        if (proposals := own.group.proposals) is not None:
            logits, boxes, targets = proposal_targets(proposals, step.targets)
            found = Answers(logits, boxes, proposed_masks(proposals, own.pixels, points))
            parts = self._matched(found, targets, step)
            losses |= weighted("proposals", parts, self.weights, self.loss.proposals)
        noisy = step.student_outputs.get("denoising")
        if noisy is not None and noisy.group.denoising is not None:
            matches = denoising_matches(noisy, step.targets)
            stable = self.options.denoising == "stable"
            parts = self._set(
                answers(noisy, points),
                step.targets,
                matches,
                step.normalizer * noisy.group.denoising.groups,
                noisy.group.padding,
                self.options.target if stable else None,
            )
            losses |= weighted("denoising", parts, self.noisy_weights, self.loss.denoising)
        shared = step.normalizer * group_count(step.student_outputs)
        losses |= group_losses(step.student_outputs, step.targets, shared, self.loss)
        return losses | one_to_many_losses(
            step.student_outputs, step.targets, step.normalizer, self.loss, step.generators
        )

    def _matched(self, found: Answers, targets: list[Target], step: Step) -> dict[str, Tensor]:
        """Matches by the modulated cost, then the set's losses."""
        options = self.options
        costs = modulated_cost(
            found.logits,
            found.boxes,
            targets,
            self.loss.costs,
            options.cost_exponent,
            options.cost_rescale,
            options.class_scatter,
            found.masks,
        )
        matches = match_costs(costs, targets)
        return self._set(found, targets, matches, step.normalizer, None, options.target)

    def _set(
        self,
        found: Answers,
        targets: Sequence[Target],
        matches: Matches,
        normalizer: Tensor,
        padding: Tensor | None,
        f1: F1 | None,
    ) -> dict[str, Tensor]:
        """The usual losses of a set; with f1 the class loss is the position-supervised one."""
        logits, boxes, masks = found
        if f1 is None:
            return set_losses(logits, boxes, targets, matches, normalizer, padding, masks=masks)
        rescale = self.options.rescale
        summed = position_supervised(logits, boxes, targets, matches, f1, rescale, padding)
        parts = matched_losses(boxes, targets, matches, normalizer, masks)
        return {"class": summed / normalizer, **parts}
