"""Losses against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from detr.models import GroupOutput, Proposals, QueryGroup, Target
from detr.models.structures import Denoising
from distill.losses.detection import denoising_matches, detection_losses
from distill.losses.matches import Matches
from distill.losses.overlap import covered, giou, iou
from distill.losses.scores import focal_loss, varifocal_loss
from distill.losses.sets import box_losses, set_losses
from distill.losses.weights import LossWeights

LN2 = math.log(2)
NO_BOXES = torch.zeros(0, 4)


def target(
    boxes: list[list[float]], labels: list[int], ignore: list[list[float]] | None = None
) -> Target:
    return Target(
        torch.tensor(boxes).reshape(-1, 4),
        torch.tensor(labels, dtype=torch.int64),
        torch.tensor(ignore or []).reshape(-1, 4),
    )


def one_match(query: int, box: int = 0) -> Matches:
    return Matches(*(torch.tensor([i]) for i in (0, 0, query, box)))


def test_focal_by_hand() -> None:
    loss = focal_loss(torch.tensor([0.0, 0.0, math.log(3.0)]), torch.tensor([1.0, 0.0, 1.0]))
    # p = 1/2, 1/2 and 3/4.
    expected = [0.25 * 0.25 * LN2, 0.75 * 0.25 * LN2, 0.25 * 0.0625 * math.log(4 / 3)]
    assert loss.tolist() == pytest.approx(expected, abs=1e-6)


def test_varifocal_by_hand() -> None:
    logits = torch.tensor([0.0, 0.0, math.log(3.0)])
    loss = varifocal_loss(logits, torch.tensor([0.5, 0.0, 0.0]), torch.tensor([True, False, True]))
    # A positive weighs its IoU, also one that misses its box; background 0.75 p^2.
    assert loss.tolist() == pytest.approx([0.5 * LN2, 0.75 * 0.25 * LN2, 0.0], abs=1e-6)


def test_varifocal_scores_learn_the_overlap() -> None:
    logits = torch.zeros(1, 1, 2, 1, requires_grad=True)
    boxes = torch.tensor([[[[0.25, 0.5, 0.5, 1.0], [0.5, 0.5, 0.1, 0.1]]]])
    truth = [target([[0.5, 0.5, 1.0, 1.0]], [0])]
    arguments = (logits, boxes, truth, one_match(0), torch.tensor(1.0))
    loss = set_losses(*arguments, scores="varifocal")["class"]
    # Half the box is covered: the goal is 1/2, where the score stands.
    assert loss.item() == pytest.approx(0.5 * LN2 + 0.75 * 0.25 * LN2, abs=1e-6)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.flatten().tolist() == pytest.approx([0.0, 0.75 * 0.25 * 0.5], abs=1e-6)


def test_focal_is_finite_for_huge_logits() -> None:
    logits = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = focal_loss(logits, torch.tensor([0.0, 1.0])).sum()
    loss.backward()
    assert loss.isfinite() and logits.grad is not None and logits.grad.isfinite().all()


def test_overlaps_by_hand() -> None:
    a, b = torch.tensor([0.0, 0.0, 2.0, 2.0]), torch.tensor([1.0, 1.0, 3.0, 3.0])
    assert float(iou(a, b)) == pytest.approx(1 / 7)
    # Hull 9, union 7: 1/7 - 2/9.
    assert float(giou(a, b)) == pytest.approx(1 / 7 - 2 / 9)
    far = torch.tensor([3.0, 0.0, 4.0, 2.0])
    # Apart: hull 8, union 6.
    assert float(giou(a, far)) == pytest.approx(-2 / 8)
    pairs = iou(torch.stack((a, b))[:, None], torch.stack((a, b, far))[None])
    assert pairs.shape == (2, 3) and pairs.diagonal().tolist() == [1.0, 1.0]


def test_box_losses_by_hand() -> None:
    boxes = torch.tensor([[0.2, 0.2, 0.4, 0.4], [0.5, 0.5, 0.2, 0.2]])
    truth = torch.tensor([[0.4, 0.2, 0.4, 0.4], [0.5, 0.5, 0.2, 0.2]])
    l1, overlap = box_losses(boxes, truth)
    assert float(l1) == pytest.approx(0.2, abs=1e-6)
    assert float(overlap) == pytest.approx(2 / 3, abs=1e-5)


def test_set_losses_are_sums_over_the_number_of_boxes() -> None:
    logits = torch.zeros(1, 1, 3, 2)
    boxes = torch.tensor([[[[0.2, 0.2, 0.4, 0.4]] * 3]])
    truth = [target([[0.4, 0.2, 0.4, 0.4]], [1])]
    losses = set_losses(logits, boxes, truth, one_match(2), torch.tensor(2.0))
    # One positive element and five negatives at p = 1/2.
    assert float(losses["class"]) == pytest.approx((0.0625 + 5 * 0.1875) * LN2 / 2, abs=1e-6)
    assert float(losses["l1"]) == pytest.approx(0.1, abs=1e-6)
    assert float(losses["giou"]) == pytest.approx(1 / 3, abs=1e-5)


def test_unmatched_queries_in_an_ignore_region_cost_nothing() -> None:
    # Query 0 matched, 1 inside the region, 2 less than half inside, 3 outside.
    boxes = torch.tensor(
        [[[[0.8, 0.8, 0.1, 0.1], [0.8, 0.8, 0.2, 0.2], [0.6, 0.8, 0.2, 0.2], [0.2, 0.2, 0.2, 0.2]]]]
    )
    logits = torch.zeros(1, 1, 4, 1, requires_grad=True)
    truth = [target([[0.8, 0.8, 0.1, 0.1]], [0], ignore=[[0.8, 0.8, 0.3, 0.3]])]
    set_losses(logits, boxes, truth, one_match(0), torch.tensor(1.0))["class"].backward()
    assert logits.grad is not None
    silent = (logits.grad.flatten() == 0).tolist()
    assert silent == [False, True, False, False]


def test_covered_share() -> None:
    box = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    regions = torch.tensor([[0.5, 0.0, 2.0, 1.0], [0.0, 0.0, 1.0, 0.25]])
    assert covered(box, regions).tolist() == [0.5]
    assert covered(box, NO_BOXES).tolist() == [0.0]


def output(role: str, count: int, layers: int, classes: int = 2) -> GroupOutput:
    group = QueryGroup(role, torch.zeros(1, count, 8), torch.full((1, count, 4), 0.5))
    boxes = torch.full((1, count, 4), 0.5)
    logits = [torch.zeros(1, count, classes, requires_grad=True) for _ in range(layers)]
    return GroupOutput(group, logits, [boxes] * layers, [], [])


def test_every_decoder_layer_is_supervised_alike() -> None:
    truth = [target([[0.5, 0.5, 0.5, 0.5]], [1])]
    one, three = output("own", 4, 1), output("own", 4, 3)
    weights = LossWeights()
    first = detection_losses({"own": one}, truth, torch.tensor(1.0), weights)
    losses = detection_losses({"own": three}, truth, torch.tensor(1.0), weights)
    assert losses["own/class"].item() == pytest.approx(3 * first["own/class"].item())
    sum(losses.values(), torch.tensor(0.0)).backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in three.logits)


def test_class_agnostic_proposals_learn_objectness_on_the_first_channel() -> None:
    own = output("own", 4, 1)
    logits = torch.zeros(1, 4, 2, requires_grad=True)
    own.group.proposals = Proposals(
        logits,
        own.boxes[0],
        torch.zeros(1, 4, dtype=torch.int64),
        torch.zeros(1, 4, 2),
        class_agnostic=True,
    )
    truth = [target([[0.5, 0.5, 0.5, 0.5]], [1])]
    losses = detection_losses({"own": own}, truth, torch.tensor(1.0), LossWeights())
    losses["proposals/class"].backward()
    assert logits.grad is not None
    assert (logits.grad[..., 0] != 0).all() and (logits.grad[..., 1] == 0).all()
    assert (logits.grad[..., 0] < 0).sum() == 1


def test_denoising_positives_follow_their_boxes_and_fillers_are_silent() -> None:
    # Two groups of [2 positives | 2 negatives]; the only image has one box.
    noisy = output("denoising", 8, 1)
    noisy.group.denoising = Denoising(groups=2, size=4)
    noisy.group.padding = torch.tensor([[False, True, False, True] * 2])
    truth = [target([[0.5, 0.5, 0.5, 0.5]], [1])]
    matches = denoising_matches(noisy, truth)
    assert matches.query.tolist() == [0, 4] and matches.box.tolist() == [0, 0]
    outputs = {"own": output("own", 4, 1), "denoising": noisy}
    losses = detection_losses(outputs, truth, torch.tensor(1.0), LossWeights())
    # 2 positive elements and 6 negative ones, divided by 1 box x 2 groups.
    expected = (2 * 0.0625 + 6 * 0.1875) * LN2 / 2
    assert losses["denoising/class"].item() == pytest.approx(expected, abs=1e-6)
    losses["denoising/class"].backward()
    assert noisy.logits[0].grad is not None
    assert (noisy.logits[0].grad[0, [1, 3, 5, 7]] == 0).all()


def test_a_batch_without_boxes_still_reaches_the_logits() -> None:
    own = output("own", 4, 1)
    losses = detection_losses({"own": own}, [target([], [])], torch.tensor(1.0), LossWeights())
    assert losses["own/l1"].item() == 0 and losses["own/giou"].item() == 0
    sum(losses.values(), torch.tensor(0.0)).backward()
    assert own.logits[0].grad is not None and (own.logits[0].grad > 0).all()
