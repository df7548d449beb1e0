"""Losses of edges' distributions: D-FINE's released criterion, and by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from detr.config import DistributionRefinementConfig
from detr.models import Denoising, GroupOutput, Proposals, QueryGroup, Target
from detr.models.heads.distribution import (
    edge_distances,
    edge_places,
    moved_edges,
    shared_places,
)
from detr.models.structures import FirstBoxes
from distill.losses.detection import denoising_matches, detection_losses, match_own
from distill.losses.edges import localization_loss
from distill.losses.matches import Matches
from distill.losses.scores import matchability_loss
from distill.losses.targets import JoinedTargets, pair_iou
from distill.losses.union import union
from distill.losses.weights import LossWeights
from distill.methods.go_lsd import GoLsd, GoLsdOptions
from distill.methods.parts.edge_kl import carried_over, edge_divergence

LAYERS, IMAGES, QUERIES, CLASSES, BINS, GROUPS, TRUE = 3, 2, 9, 4, 8, 2, 5
REFINEMENT = DistributionRefinementConfig(bins=BINS)
# What Peterande/D-FINE's criterion says of the numbers below, weighted, summed over layers.
PUBLISHED = {
    "own/class": 6.44205,
    "own/l1": 6.81962,
    "own/giou": 4.05507,
    "own/edges": 2.57132,
    "own/ddf": 5.06488,
    "own_first/class": 2.05766,
    "own_first/l1": 2.37127,
    "own_first/giou": 1.36963,
    "proposals/class": 1.97297,
    "proposals/l1": 2.47715,
    "proposals/giou": 1.39345,
    "denoising/class": 6.90878,
    "denoising/l1": 10.84157,
    "denoising/giou": 5.30067,
    "denoising/edges": 1.58148,
    "denoising/ddf": 5.09041,
    "denoising_first/class": 2.44673,
    "denoising_first/l1": 3.70245,
    "denoising_first/giou": 1.79685,
}


def answers(drawn: np.random.RandomState, role: str, count: int) -> GroupOutput:
    """Answers of a group, from numbers of a legacy generator, whose streams never change."""

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(drawn.standard_normal(shape).astype(np.float32))

    def uniform(*shape: int) -> Tensor:
        return torch.from_numpy((0.2 + 0.6 * drawn.random_sample(shape)).astype(np.float32))

    def near(boxes: Tensor, *layers: int) -> Tensor:
        return boxes + 0.15 * (uniform(*layers, *boxes.shape) - 0.5)

    base, places = normal(IMAGES, count, CLASSES), uniform(IMAGES, count, 4)
    logits = base + 0.3 * normal(LAYERS, IMAGES, count, CLASSES)
    boxes = near(places, LAYERS)
    edges = 2 * normal(LAYERS, IMAGES, count, 4 * (BINS + 1))
    first = FirstBoxes(base + 0.3 * normal(*base.shape), near(places), REFINEMENT)
    hidden = torch.zeros(IMAGES, count, 8)
    output = GroupOutput(QueryGroup(role, hidden, first.boxes), list(logits), list(boxes), [], [])
    output.first, output.edges = first, list(edges.unflatten(-1, (4, -1)))
    if role == "own":
        found = first.logits + 0.3 * normal(*base.shape), near(first.boxes)
        tokens = torch.zeros(IMAGES, count, dtype=torch.int64)
        output.group.proposals = Proposals(*found, tokens, hidden)
    else:
        output.group.denoising = Denoising(GROUPS, 2 * TRUE)
    return output


@pytest.fixture
def case() -> tuple[dict[str, GroupOutput], list[Target]]:
    drawn = np.random.RandomState(4)
    own = answers(drawn, "own", QUERIES)
    truth = []
    for _ in range(IMAGES):
        boxes = (0.2 + 0.6 * drawn.random_sample((TRUE, 4))).astype(np.float32)
        labels = torch.from_numpy(drawn.randint(0, CLASSES, TRUE))
        truth.append(Target(torch.from_numpy(boxes), labels, torch.zeros(0, 4)))
    noisy = answers(drawn, "denoising", GROUPS * 2 * TRUE)
    return {"own": own, "denoising": noisy}, truth


WEIGHTS = LossWeights(scores="varifocal", edges=0.15, box_pairs="union")


def test_everything_costs_what_the_released_criterion_says(
    case: tuple[dict[str, GroupOutput], list[Target]],
) -> None:
    outputs, truth = case
    normalizer = torch.tensor(float(IMAGES * TRUE))
    found = {k: float(x) for k, x in detection_losses(outputs, truth, normalizer, WEIGHTS).items()}
    wanted = {key: value for key, value in PUBLISHED.items() if not key.endswith("/ddf")}
    assert found == pytest.approx(wanted, rel=2e-4)


def test_layers_follow_the_last_as_the_released_criterion_says(
    case: tuple[dict[str, GroupOutput], list[Target]],
) -> None:
    outputs, truth = case
    method = GoLsd.__new__(GoLsd)
    torch.nn.Module.__init__(method)
    method.options, method.loss = GoLsdOptions(), WEIGHTS
    step: Any = SimpleNamespace(student_outputs=outputs, targets=truth)
    found = {key: float(x) for key, x in method.losses(step).items()}
    wanted = {f"go_lsd/{k}": PUBLISHED[f"{k}/ddf"] for k in ("own", "denoising")}
    assert found == pytest.approx(wanted, rel=2e-4)


def test_without_a_union_each_layer_has_its_own_pairs(
    case: tuple[dict[str, GroupOutput], list[Target]],
) -> None:
    outputs, truth = case
    normalizer = torch.tensor(float(IMAGES * TRUE))
    alone = detection_losses(outputs, truth, normalizer, WEIGHTS.replace(box_pairs="own"))
    together = detection_losses(outputs, truth, normalizer, WEIGHTS)
    for key in together:
        same = key.endswith("/class") or key.startswith("denoising")
        assert (float(alone[key]) == pytest.approx(float(together[key]), rel=1e-6)) == same, key


def test_matchability_by_hand() -> None:
    logits = torch.tensor([0.0, 0.0, math.log(3.0)])
    goal, positive = torch.tensor([0.25, 0.0, 0.0]), torch.tensor([True, False, True])
    # Positives weigh one and learn IoU ** 1.5, also one that misses its box; background p ** 1.5.
    expected = [math.log(2), 0.5**1.5 * math.log(2), math.log(4)]
    assert matchability_loss(logits, goal, positive).tolist() == pytest.approx(expected, abs=1e-6)


def test_a_query_keeps_the_box_that_most_layers_gave_it() -> None:
    def layer(*pairs: tuple[int, int]) -> Matches:
        query, box = torch.tensor(pairs).unbind(1)
        return Matches(torch.zeros_like(query), torch.zeros_like(query), query, box)

    found = union([layer((3, 0), (5, 1)), layer((3, 1), (5, 0)), layer((2, 0), (3, 1))])
    assert list(zip(found.query.tolist(), found.box.tolist(), strict=True)) == [
        (2, 0),
        (3, 1),
        (5, 0),
    ]
    assert not found.layer.any() and not found.image.any()


def test_places_are_the_papers() -> None:
    """Equation 4 with a = 0.5, c = 0.25 in sizes of the box; the outermost lie twice as far."""
    places = edge_places(DistributionRefinementConfig(bins=32)) / 4
    step = (0.5 / 0.25 + 1) ** (2 / 30)
    assert len(places) == 33 and float(places[16]) == 0
    assert float(places[17]) == pytest.approx(0.25 * (step - 1), rel=1e-5)
    assert places[[0, 1, 31, 32]].tolist() == pytest.approx([-1, -0.5, 0.5, 1], rel=1e-5)
    torch.testing.assert_close(places, -places.flip(0))


def test_edges_move_outwards_and_back() -> None:
    first = torch.tensor([0.5, 0.5, 0.2, 0.4])
    moved = moved_edges(first, torch.tensor([4.0, 0.0, 0.0, -1.0]), 4.0)
    # The left edge goes out by a whole width, the lower one in by a quarter of the height.
    assert moved.tolist() == pytest.approx([0.4, 0.45, 0.4, 0.3], abs=1e-6)
    torch.manual_seed(0)
    boxes, others = 0.2 + 0.3 * torch.rand(2, 7, 4)
    torch.testing.assert_close(moved_edges(boxes, edge_distances(boxes, others, 4.0), 4.0), others)


def test_a_place_between_two_is_shared() -> None:
    places = torch.tensor([-2.0, -1.0, 0.0, 3.0])
    left, share = shared_places(torch.tensor([-5.0, -2.0, -1.25, 0.0, 2.0, 3.0, 9.0]), places)
    assert left.tolist() == [0, 0, 0, 2, 2, 2, 2]
    assert share.tolist() == pytest.approx([0, 0, 0.75, 0, 2 / 3, 1, 1])


def test_distributions_at_the_truth_cost_least(
    case: tuple[dict[str, GroupOutput], list[Target]],
) -> None:
    """Gradient descent on the logits alone brings the edges to where the objects' are."""
    outputs, truth = case
    own = outputs["own"]
    matches = match_own(own, truth, WEIGHTS).layers
    assert own.first is not None
    edges = torch.zeros(LAYERS, IMAGES, QUERIES, 4, BINS + 1, requires_grad=True)
    optimizer = torch.optim.Adam([edges], lr=0.3)
    true = torch.stack([t.boxes for t in truth])[matches.image, matches.box]
    first = own.first.boxes[matches.image, matches.query]
    for _ in range(150):
        own.edges = list(edges)
        own.boxes = [true.new_zeros(IMAGES, QUERIES, 4) + 0.5] * LAYERS
        loss = localization_loss(own, truth, matches)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    probabilities = edges[matches.layer, matches.image, matches.query].softmax(-1)
    distances = probabilities @ edge_places(REFINEMENT)
    wanted = edge_distances(first, true, REFINEMENT.curvature)
    reached = wanted.abs() < float(edge_places(REFINEMENT).max())
    weighs = (pair_iou(torch.stack(own.boxes), matches, JoinedTargets.of(truth)) > 0.05)[:, None]
    assert int((reached & weighs).sum()) > 40
    off = (distances - wanted).detach().abs()[reached & weighs]
    assert float(off.max()) < 0.15


def test_denoising_knows_its_boxes(case: tuple[dict[str, GroupOutput], list[Target]]) -> None:
    outputs, truth = case
    known = denoising_matches(outputs["denoising"], truth).at(0)
    assert len(known.query) == IMAGES * GROUPS * TRUE


def first_boxes(config: DistributionRefinementConfig, boxes: Tensor) -> FirstBoxes:
    return FirstBoxes(torch.zeros(*boxes.shape[:2], 1), boxes, config)


def test_carried_over_to_the_same_places_nothing_changes() -> None:
    torch.manual_seed(0)
    edges, boxes = torch.randn(2, 3, 4, BINS + 1), 0.3 + 0.2 * torch.rand(2, 3, 4)
    first = first_boxes(REFINEMENT, boxes)
    goal = carried_over(edges, first, first, 5.0)
    torch.testing.assert_close(goal, (edges / 5).softmax(-1), atol=1e-5, rtol=0)
    assert edge_divergence(edges, goal, 5.0).abs().max() < 1e-3


def test_carried_over_to_other_places_the_box_stays() -> None:
    """The mean of a distribution that our places cover is where the other detector put it."""
    torch.manual_seed(0)
    theirs = DistributionRefinementConfig(bins=16, curvature=8.0)
    ours = DistributionRefinementConfig(bins=64, reach=2.0)
    base = 0.4 + 0.1 * torch.rand(2, 3, 4)
    moved = base + 0.02 * torch.randn(2, 3, 4)
    edges = 3 * torch.randn(2, 3, 4, 17)
    goal = carried_over(edges, first_boxes(theirs, base), first_boxes(ours, moved), 1.0)
    torch.testing.assert_close(goal.sum(-1), torch.ones(2, 3, 4))
    wanted = moved_edges(base, edges.softmax(-1) @ edge_places(theirs), 8.0)
    torch.testing.assert_close(moved_edges(moved, goal @ edge_places(ours), 4.0), wanted)
