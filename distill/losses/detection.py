"""The detection loss: class scores, L1, GIoU and masks over matched queries, deeply supervised.

Own queries and encoder proposals are matched per layer; denoising queries know their box. Every
loss is a sum divided by the number of ground-truth boxes, so its scale does not depend on the
number of queries. Where boxes are read off distributions, these learn as well
(:mod:`distill.losses.edges`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from detr.models import GroupOutput, Proposals, Target
from distill.losses.answers import answers
from distill.losses.edges import localization_loss
from distill.losses.groups import group_count, group_losses
from distill.losses.masks import Points, proposed_masks
from distill.losses.matcher import match
from distill.losses.matches import Matches
from distill.losses.sets import set_losses, weighted
from distill.losses.union import BoxPairs, OwnMatches
from distill.losses.weights import LossWeights


def denoising_matches(output: GroupOutput, targets: Sequence[Target]) -> Matches:
    """The known assignment of denoising queries: query j of every group stands for box j.

    Layers are those of :func:`distill.losses.answers.answers`.
    """
    info = output.group.denoising
    assert info is not None
    device = output.logits[0].device
    count = len(output.logits) + (output.initial is not None)
    layers, groups = torch.arange(count), torch.arange(info.groups)
    tables = [
        torch.cartesian_prod(layers, torch.tensor([i]), groups, torch.arange(len(target.labels)))
        for i, target in enumerate(targets)
    ]
    layer, image, group, box = torch.cat(tables).to(device, non_blocking=True).unbind(1)
    return Matches(layer, image, group * info.size + box, box)


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
    matches: Matches | None = None,
    boxed: BoxPairs | None = None,
) -> dict[str, Tensor]:
    """Unweighted losses of the encoder proposals of a group, matched as queries are.

    Args:
        output: Of a group made of proposals.
        targets: Ground truth per image.
        normalizer: Scalar every sum is divided by.
        weights: The recipe's weights.
        points: How masks are compared.
        matches: The assignment, where it is known.
        boxed: See :func:`set_losses`.
    """
    proposals = output.group.proposals
    assert proposals is not None
    logits, boxes, wanted = proposal_targets(proposals, targets)
    masks = proposed_masks(proposals, output.pixels, points)
    if matches is None:
        matches = match(logits, boxes, wanted, weights.costs, masks=masks)
    scores = weights.scores
    return set_losses(
        logits, boxes, wanted, matches, normalizer, scores=scores, boxed=boxed, masks=masks
    )


def detection_losses(
    outputs: Mapping[str, GroupOutput],
    targets: Sequence[Target],
    normalizer: Tensor,
    weights: LossWeights,
    generators: Sequence[torch.Generator] | None = None,
) -> dict[str, Tensor]:
    """Weighted losses of the own, one-to-many and denoising queries and of the proposals.

    Where groups learn the same (:mod:`distill.losses.groups`), the own queries are one of them.

    A method with a loss of its own for the own queries asks :func:`side_losses` for the rest.

    Args:
        outputs: Decoder outputs by role; ``own``, ``groups``, ``one_to_many`` and ``denoising``
            are looked at.
        targets: Ground truth per image.
        normalizer: Scalar, the number of ground-truth boxes (section 0.3's divisor).
        weights: The recipe's weights.
        generators: On the CPU, one per image, for the points at which masks are compared.

    Returns:
        ``own/class``, ``own/l1``, ..., ``proposals/...``, ``denoising/...``, each summed
        over decoder layers.
    """
    own, points = outputs["own"], Points(weights.mask_points, generators)
    logits, boxes, masks = answers(own, points)
    matches = None
    if own.first is not None or weights.box_pairs == "union":
        matches = match_own(own, targets, weights, points)
        layers = matches.layers
    else:
        costs, no_object = weights.costs, own.no_object
        layers = match(logits, boxes, targets, costs, no_object=no_object, masks=masks)
    parts = set_losses(
        logits,
        boxes,
        targets,
        layers,
        normalizer * group_count(outputs),
        no_object=weights.no_object if own.no_object else None,
        scores=weights.scores,
        boxed=None if matches is None else matches.boxed(len(boxes)),
        masks=masks,
    )
    return weighted("own", parts, weights) | side_losses(
        outputs, targets, normalizer, weights, generators, matches
    )


def match_own(
    own: GroupOutput,
    targets: Sequence[Target],
    weights: LossWeights,
    points: Points | None = None,
) -> OwnMatches:
    """The assignments of the own queries, of what they said first and of the proposals.

    Args:
        own: Their answers.
        targets: Ground truth per image.
        weights: The recipe's weights.
        points: How masks are compared, where they are part of the cost.
    """
    logits, boxes, masks = answers(own, points or Points(weights.mask_points, None))
    masks = None if points is None else masks
    layers = match(logits, boxes, targets, weights.costs, no_object=own.no_object, masks=masks)
    first = proposals = None
    if own.first is not None:
        first = match(own.first.logits[None], own.first.boxes[None], targets, weights.costs)
    if own.group.proposals is not None:
        known = None if points is None else proposed_masks(own.group.proposals, own.pixels, points)
        found = proposal_targets(own.group.proposals, targets)
        proposals = match(*found, weights.costs, masks=known)
    return OwnMatches(layers, first, proposals, weights.box_pairs == "union")


def side_losses(
    outputs: Mapping[str, GroupOutput],
    targets: Sequence[Target],
    normalizer: Tensor,
    weights: LossWeights,
    generators: Sequence[torch.Generator] | None = None,
    matches: OwnMatches | None = None,
) -> dict[str, Tensor]:
    """The part of :func:`detection_losses` that is not about the own queries' classes and boxes.

    Args:
        outputs: As there.
        targets: As there.
        normalizer: As there.
        weights: As there.
        generators: As there.
        matches: Of the own queries, where they are known.
    """
    own, points = outputs["own"], Points(weights.mask_points, generators)
    if matches is None and (own.first is not None or weights.box_pairs == "union"):
        matches = match_own(own, targets, weights, points)
    losses: dict[str, Tensor] = {}
    if own.group.proposals is not None:
        known, boxed = (None, None) if matches is None else (matches.proposals, matches.boxed(1))
        divisor = normalizer * group_count(outputs)
        parts = proposal_losses(own, targets, divisor, weights, points, known, boxed)
        losses |= weighted("proposals", parts, weights, weights.proposals)
    if matches is not None:
        losses |= edge_losses("own", own, targets, matches, normalizer, weights)
    losses |= group_losses(outputs, targets, normalizer * group_count(outputs), weights)
    losses |= one_to_many_losses(outputs, targets, normalizer, weights, generators)

    if (noisy := outputs.get("denoising")) is not None and noisy.group.denoising is not None:
        given = denoising_matches(noisy, targets)
        divisor = normalizer * noisy.group.denoising.groups
        logits, boxes, masks = answers(noisy, points)
        parts = set_losses(
            logits,
            boxes,
            targets,
            given,
            divisor,
            noisy.group.padding,
            scores=weights.scores,
            masks=masks,
        )
        losses |= weighted("denoising", parts, weights, weights.denoising)
        if noisy.first is not None:
            # Taking a layer's matches apart waits for the device, so only where it is of use.
            told = OwnMatches(given, given.at(0), None, False)
            found = edge_losses("denoising", noisy, targets, told, divisor, weights)
            losses |= {key: weights.denoising * value for key, value in found.items()}
    return losses


def edge_losses(
    name: str,
    output: GroupOutput,
    targets: Sequence[Target],
    matches: OwnMatches,
    normalizer: Tensor,
    weights: LossWeights,
) -> dict[str, Tensor]:
    """``name_first/...`` and ``name/edges`` of a group whose boxes are read off distributions.

    Args:
        name: Of the group.
        output: Its answers.
        targets: Ground truth per image.
        matches: Its assignments.
        normalizer: Scalar every sum is divided by.
        weights: The recipe's weights.
    """
    if output.first is None or matches.first is None:
        return {}
    first = output.first
    parts = set_losses(
        first.logits[None],
        first.boxes[None],
        targets,
        matches.first,
        normalizer,
        output.group.padding,
        scores=weights.scores,
        boxed=matches.boxed(1),
    )
    losses = weighted(f"{name}_first", parts, weights)
    if weights.edges:
        boxed = matches.boxed(len(output.boxes)) or BoxPairs(matches.layers, normalizer)
        found = localization_loss(output, targets, boxed.matches) / boxed.normalizer
        losses[f"{name}/edges"] = weights.edges * found
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
