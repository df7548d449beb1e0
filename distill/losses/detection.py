"""The detection loss: focal or varifocal, L1 and GIoU over matched queries, deeply supervised.

Own queries and encoder proposals are matched per layer; denoising queries know their box. Every
loss is a sum divided by the number of ground-truth boxes, so its scale does not depend on the
number of queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from detr.config import Strict, Weight
from detr.models import GroupOutput, Proposals, Target, cxcywh_to_xyxy
from distill.distributed import mean_over_processes
from distill.losses.answers import answers
from distill.losses.costs import ALPHA, GAMMA, MatchingCosts
from distill.losses.masks import MaskPredictions, Points, mask_losses, proposed_masks
from distill.losses.matcher import match
from distill.losses.matches import Matches
from distill.losses.overlap import covered, giou, iou
from distill.losses.targets import JoinedTargets

# A query this much inside an ignore region is not called background.
IGNORED_SHARE = 0.5

ScoreLoss = Literal["focal", "varifocal"]
# Weight of the background in the varifocal loss; RT-DETR's configs and its paper's code.
VARIFOCAL_ALPHA = 0.75


class LossWeights(Strict):
    """Weights of the detection loss.

    Attributes:
        focal: Of the class loss (1 for DINO, DETR and RT-DETR, 2 for Deformable DETR).
        scores: What sigmoid scores learn: ``focal`` loss towards 1 for a matched query, or
            ``varifocal`` towards the IoU of its box (RT-DETR).
        l1, giou: Of the box losses.
        mask, dice: Of the mask losses, cross-entropy and dice, in a detector with masks.
        cost_class, cost_l1, cost_giou, cost_mask, cost_dice: Of the matching cost.
        mask_points: Points of a mask that both look at (Mask2Former: 112 x 112).
        proposals: Factor on the same losses of the encoder's proposals.
        denoising: Factor on the same losses of the denoising queries.
        one_to_many: Factor on the same losses of the one-to-many queries (H-DETR).
        no_object: Weight of "no object" in a softmax class loss (DETR).
    """

    focal: Weight = 1.0
    scores: ScoreLoss = "focal"
    l1: Weight = 5.0
    giou: Weight = 2.0
    mask: Weight = 5.0
    dice: Weight = 5.0
    cost_class: Weight = 2.0
    cost_l1: Weight = 5.0
    cost_giou: Weight = 2.0
    cost_mask: Weight = 5.0
    cost_dice: Weight = 5.0
    mask_points: Annotated[int, Field(ge=4, le=1_000_000)] = 12544
    proposals: Weight = 1.0
    denoising: Weight = 1.0
    one_to_many: Weight = 1.0
    no_object: Weight = 0.1

    @property
    def costs(self) -> MatchingCosts:
        """Weights of the matching cost."""
        boxes = self.cost_class, self.cost_l1, self.cost_giou
        return MatchingCosts(*boxes, self.cost_mask, self.cost_dice)


def focal_loss(logits: Tensor, targets: Tensor, alpha: float = ALPHA) -> Tensor:
    """Sigmoid focal loss per element, gamma 2 (Lin et al. 2017, eq. 5), float32.

    Args:
        logits: Any shape.
        targets: Same shape, 0 or 1.
        alpha: Weight of the ones; zeros weigh ``1 - alpha``.
    """
    logits = logits.float()
    p = logits.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    wrong = p + targets - 2 * p * targets  # 1 - p_t
    balance = alpha * targets + (1 - alpha) * (1 - targets)
    return balance * wrong**GAMMA * cross_entropy


def varifocal_loss(logits: Tensor, goal: Tensor, positive: Tensor) -> Tensor:
    """Varifocal loss per element, alpha 0.75 and gamma 2, float32.

    Zhang et al. 2021, VarifocalNet, equation 2: positives weigh as much as their goal, which is the
    IoU of their box, the others by their own score. Weights carry no gradient, as in RT-DETR's
    code.

    Args:
        logits: Any shape.
        goal: Same shape, in [0, 1]; zero but for the positives.
        positive: Same shape, bool.
    """
    logits = logits.float()
    background = VARIFOCAL_ALPHA * logits.detach().sigmoid() ** GAMMA
    cross_entropy = F.binary_cross_entropy_with_logits(logits, goal, reduction="none")
    return torch.where(positive, goal, background) * cross_entropy


def pair_iou(boxes: Tensor, matches: Matches, truth: JoinedTargets) -> Tensor:
    """``[M]`` IoU of the matched predictions with their boxes, in [0, 1], without gradient."""
    found = boxes[matches.layer, matches.image, matches.query].detach().float()
    overlap = iou(cxcywh_to_xyxy(found), cxcywh_to_xyxy(truth.of_pairs(matches)[0]))
    return overlap.clamp(0, 1)


def softmax_loss(
    logits: Tensor,
    place: tuple[Tensor, Tensor, Tensor],
    labels: Tensor,
    silent: Tensor,
    no_object: float,
) -> Tensor:
    """Cross-entropy with "no object" as the last class (DETR section 3.1), float32.

    Args:
        logits: ``[L, B, N, K + 1]``.
        place: Indices of the matched queries in ``[L, B, N]``.
        labels: Their classes.
        silent: ``[L, B, N]`` bool, queries without any loss.
        no_object: Weight of queries that should say "no object"; the others weigh 1.

    Returns:
        The weighted mean over each layer's queries of all processes, summed over layers.
    """
    wanted = torch.full(silent.shape, logits.shape[-1] - 1, device=logits.device)
    wanted[place] = labels
    weight = torch.full(silent.shape, no_object, device=logits.device)
    weight[place] = 1.0
    weight = weight.masked_fill(silent, 0.0)
    entropy = F.cross_entropy(logits.float().movedim(-1, 1), wanted, reduction="none")
    total = mean_over_processes(weight.sum((1, 2))).clamp(min=1e-6)
    return ((entropy * weight).sum((1, 2)) / total).sum()


def box_losses(boxes: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Summed L1 and summed ``1 - GIoU`` of ``[M, 4]`` cx cy w h boxes, float32."""
    boxes = boxes.float()
    return (
        (boxes - targets).abs().sum(),
        (1 - giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(targets))).sum(),
    )


def ignored(boxes: Tensor, targets: Sequence[Target]) -> Tensor:
    """``[L, B, N]`` bool: which of the ``[L, B, N, 4]`` boxes lie in an ignore region."""
    share = [
        covered(cxcywh_to_xyxy(boxes[:, i].detach().float()), cxcywh_to_xyxy(target.ignore))
        for i, target in enumerate(targets)
    ]
    return torch.stack(share, 1) >= IGNORED_SHARE


def set_losses(
    logits: Tensor,
    boxes: Tensor,
    targets: Sequence[Target],
    matches: Matches,
    normalizer: Tensor,
    padding: Tensor | None = None,
    no_object: float | None = None,
    scores: ScoreLoss = "focal",
    masks: MaskPredictions | None = None,
) -> dict[str, Tensor]:
    """Unweighted losses of ``[L, B, N]`` predictions whose assignment is known, summed over layers.

    Args:
        logits: ``[L, B, N, K]``.
        boxes: ``[L, B, N, 4]`` cx cy w h.
        targets: Ground truth per image.
        matches: The assigned pairs; every other query should predict no class.
        normalizer: Scalar every sum is divided by.
        padding: ``[B, N]`` bool, queries without any loss.
        no_object: Weight of the last logit, where it says "no object" (softmax); ``None`` for
            sigmoid scores. A layer's class loss is then a weighted mean over its queries (DETR).
        scores: What sigmoid scores learn, see :class:`LossWeights`.
        masks: Of the same predictions, in a detector with masks.

    Returns:
        ``class``, ``l1`` and ``giou``, with masks ``mask`` and ``dice``, scalars.
    """
    truth = JoinedTargets.of(targets)
    _, labels = truth.of_pairs(matches)
    place = (matches.layer, matches.image, matches.query)

    silent = torch.zeros(logits.shape[:-1], dtype=torch.bool, device=logits.device)
    if any(len(target.ignore) for target in targets):
        silent = ignored(boxes, targets)
        silent[place] = False
    if padding is not None:
        silent = silent | padding
    if no_object is None:
        one_hot = torch.zeros_like(logits, dtype=torch.float32)
        positives = (*place, labels)
        one_hot[positives] = 1.0
        if scores == "varifocal":
            goal = torch.zeros_like(one_hot)
            goal[positives] = pair_iou(boxes, matches, truth)
            per_class = varifocal_loss(logits, goal, one_hot > 0)
        else:
            per_class = focal_loss(logits, one_hot)
        per_class = per_class.masked_fill(silent[..., None], 0.0)
        class_loss = per_class.sum() / normalizer
    else:
        class_loss = softmax_loss(logits, place, labels, silent, no_object)
    return {"class": class_loss, **matched_losses(boxes, targets, matches, normalizer, masks)}


def matched_losses(
    boxes: Tensor,
    targets: Sequence[Target],
    matches: Matches,
    normalizer: Tensor,
    masks: MaskPredictions | None = None,
) -> dict[str, Tensor]:
    """Box and mask losses of :func:`set_losses`, which only the matched queries have."""
    true_boxes, _ = JoinedTargets.of(targets).of_pairs(matches)
    l1, overlap = box_losses(boxes[matches.layer, matches.image, matches.query], true_boxes)
    parts = {"l1": l1 / normalizer, "giou": overlap / normalizer}
    return parts if masks is None else parts | mask_losses(masks, targets, matches, normalizer)


def denoising_matches(output: GroupOutput, targets: Sequence[Target]) -> Matches:
    """The known assignment of denoising queries: query j of every group stands for box j.

    Layers are those of :func:`distill.losses.answers.answers`.
    """
    info = output.group.denoising
    assert info is not None
    device = output.logits[0].device
    answers = len(output.logits) + (output.first is not None)
    layers, groups = torch.arange(answers), torch.arange(info.groups)
    tables = [
        torch.cartesian_prod(layers, torch.tensor([i]), groups, torch.arange(len(target.labels)))
        for i, target in enumerate(targets)
    ]
    layer, image, group, box = torch.cat(tables).to(device, non_blocking=True).unbind(1)
    return Matches(layer, image, group * info.size + box, box)


def weighted(
    name: str, parts: Mapping[str, Tensor], weights: LossWeights, factor: float = 1.0
) -> dict[str, Tensor]:
    """``name/class``, ``name/l1``, ``name/giou``, ...: a set's losses with the recipe's weights."""
    of_part = {"class": weights.focal, "l1": weights.l1, "giou": weights.giou}
    of_part |= {"mask": weights.mask, "dice": weights.dice}
    return {
        f"{name}/{part}": factor * weight * parts[part]
        for part, weight in of_part.items()
        if part in parts
    }


def proposal_targets(
    proposals: Proposals, targets: Sequence[Target]
) -> tuple[Tensor, Tensor, list[Target]]:
    """Logits ``[1, B, N, K]``, boxes and ground truth of the proposals' own set loss.

    Two-stage Deformable DETR trains its proposals to tell objects from background on the first
    class channel; DINO's proposals predict classes.
    """
    logits, boxes = proposals.logits[None], proposals.boxes[None]
    if not proposals.class_agnostic:
        return logits, boxes, list(targets)
    agnostic = [replace(t, labels=torch.zeros_like(t.labels)) for t in targets]
    return logits[..., :1], boxes, agnostic


def proposal_losses(
    output: GroupOutput,
    targets: Sequence[Target],
    normalizer: Tensor,
    weights: LossWeights,
    points: Points,
) -> dict[str, Tensor]:
    """Unweighted losses of the encoder proposals of a group, matched as queries are."""
    proposals = output.group.proposals
    assert proposals is not None
    logits, boxes, wanted = proposal_targets(proposals, targets)
    masks = proposed_masks(proposals, output.pixels, points)
    matches = match(logits, boxes, wanted, weights.costs, masks=masks)
    scores = weights.scores
    return set_losses(logits, boxes, wanted, matches, normalizer, scores=scores, masks=masks)


def detection_losses(
    outputs: Mapping[str, GroupOutput],
    targets: Sequence[Target],
    normalizer: Tensor,
    weights: LossWeights,
    generators: Sequence[torch.Generator] | None = None,
) -> dict[str, Tensor]:
    """Weighted losses of the own, one-to-many and denoising queries and of the proposals.

    A method with a loss of its own for the own queries asks :func:`side_losses` for the rest.

    Args:
        outputs: Decoder outputs by role; ``own``, ``one_to_many`` and ``denoising`` are
            looked at.
        targets: Ground truth per image.
        normalizer: Scalar, the number of ground-truth boxes (section 0.3's divisor).
        weights: The recipe's weights.
        generators: On the CPU, one per image, for the points at which masks are compared.

    Returns:
        ``own/class``, ``own/l1``, ..., ``proposals/...``, ``denoising/...``, each summed
        over decoder layers.
    """
    own = outputs["own"]
    logits, boxes, masks = answers(own, Points(weights.mask_points, generators))
    matches = match(logits, boxes, targets, weights.costs, no_object=own.no_object, masks=masks)
    no_object = weights.no_object if own.no_object else None
    parts = set_losses(
        logits,
        boxes,
        targets,
        matches,
        normalizer,
        no_object=no_object,
        scores=weights.scores,
        masks=masks,
    )
    return weighted("own", parts, weights) | side_losses(
        outputs, targets, normalizer, weights, generators
    )


def side_losses(
    outputs: Mapping[str, GroupOutput],
    targets: Sequence[Target],
    normalizer: Tensor,
    weights: LossWeights,
    generators: Sequence[torch.Generator] | None = None,
) -> dict[str, Tensor]:
    """The part of :func:`detection_losses` that is not about the own queries."""
    points = Points(weights.mask_points, generators)
    losses: dict[str, Tensor] = {}
    if outputs["own"].group.proposals is not None:
        parts = proposal_losses(outputs["own"], targets, normalizer, weights, points)
        losses |= weighted("proposals", parts, weights, weights.proposals)

    losses |= one_to_many_losses(outputs, targets, normalizer, weights, generators)

    if (noisy := outputs.get("denoising")) is not None and noisy.group.denoising is not None:
        logits, boxes, masks = answers(noisy, points)
        parts = set_losses(
            logits,
            boxes,
            targets,
            denoising_matches(noisy, targets),
            normalizer * noisy.group.denoising.groups,
            noisy.group.padding,
            scores=weights.scores,
            masks=masks,
        )
        losses |= weighted("denoising", parts, weights, weights.denoising)
    return losses


def one_to_many_losses(
    outputs: Mapping[str, GroupOutput],
    targets: Sequence[Target],
    normalizer: Tensor,
    weights: LossWeights,
    generators: Sequence[torch.Generator] | None = None,
) -> dict[str, Tensor]:
    """``one_to_many/...`` and those of its proposals (H-DETR); nothing without the group."""
    losses: dict[str, Tensor] = {}
    many = outputs.get("one_to_many")
    if many is None:
        return losses
    # Every box once per query it is shared by; the divisor counts the copies, too.
    times, points = many.group.repeat, Points(weights.mask_points, generators)
    shared = [_repeated(target, times) for target in targets]
    logits, boxes, masks = answers(many, points)
    matches = match(logits, boxes, shared, weights.costs, masks=masks)
    divisor, scores = normalizer * times, weights.scores
    parts = set_losses(logits, boxes, shared, matches, divisor, scores=scores, masks=masks)
    losses |= weighted("one_to_many", parts, weights, weights.one_to_many)
    if many.group.proposals is not None:
        parts = proposal_losses(many, shared, divisor, weights, points)
        factor = weights.proposals * weights.one_to_many
        losses |= weighted("one_to_many_proposals", parts, weights, factor)
    return losses


def _repeated(target: Target, times: int) -> Target:
    """Every object so many times."""
    masks = None if target.masks is None else target.masks.repeat(times, 1, 1)
    return Target(target.boxes.repeat(times, 1), target.labels.repeat(times), target.ignore, masks)
