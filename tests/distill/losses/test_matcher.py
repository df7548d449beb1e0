"""The matcher against brute force."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from torch import Tensor

from detr.models import Target
from distill.losses.costs import MatchingCosts
from distill.losses.matcher import match


def random_case(
    layers: int, counts: list[int], queries: int, classes: int
) -> tuple[Tensor, Tensor, list[Target]]:
    generator = torch.Generator().manual_seed(sum(counts) + queries)
    logits = torch.randn(layers, len(counts), queries, classes, generator=generator)
    boxes = torch.rand(layers, len(counts), queries, 4, generator=generator) * 0.5 + 0.1
    targets = [
        Target(
            torch.rand(n, 4, generator=generator) * 0.5 + 0.1,
            torch.randint(classes, (n,), generator=generator),
            torch.zeros(0, 4),
        )
        for n in counts
    ]
    return logits, boxes, targets


@pytest.mark.parametrize("counts", [[3, 0, 2], [1], [4, 4]])
def test_assignment_is_the_cheapest_of_all(counts: list[int]) -> None:
    logits, boxes, targets = random_case(2, counts, 5, 3)
    cost = MatchingCosts().matrix(logits, boxes, targets)
    matches = match(logits, boxes, targets)
    assert len(matches.query) == 2 * sum(counts)
    for layer in range(2):
        for image, count in enumerate(counts):
            here = (matches.layer == layer) & (matches.image == image)
            queries, found = matches.query[here], matches.box[here]
            assert sorted(found.tolist()) == list(range(count))
            assert len(set(queries.tolist())) == count
            total = cost[layer, image, queries, found].sum()
            best = min(
                sum(float(cost[layer, image, q, j]) for j, q in enumerate(chosen))
                for chosen in permutations(range(5), count)
            )
            assert float(total) == pytest.approx(best, abs=1e-5)


def test_cost_of_one_pair_by_hand() -> None:
    # p = 0.5: alpha term 0.25 * 0.25 * ln 2, negative term 0.75 * 0.25 * ln 2.
    # Boxes [0, 0, .4, .4] and [.2, 0, .6, .4]: L1 0.2, IoU 1/3, hull 0.24 = union: GIoU 1/3.
    targets = [Target(torch.tensor([[0.4, 0.2, 0.4, 0.4]]), torch.tensor([1]), torch.zeros(0, 4))]
    boxes = torch.tensor([[[[0.2, 0.2, 0.4, 0.4]]]])
    cost = MatchingCosts().matrix(torch.zeros(1, 1, 1, 2), boxes, targets)
    expected = 2 * (0.0625 - 0.1875) * 0.693147 + 5 * 0.2 - 2 / 3
    assert cost.item() == pytest.approx(expected, abs=1e-5)


def test_a_prediction_that_is_not_a_number_is_matched_last() -> None:
    logits, boxes, targets = random_case(1, [3], 4, 2)
    logits[0, 0, 1] = float("nan")
    boxes[0, 0, 1] = float("inf")
    assert 1 not in match(logits, boxes, targets).query.tolist()


def test_more_boxes_than_queries_and_none_at_all() -> None:
    logits, boxes, targets = random_case(1, [6, 0], 4, 2)
    matches = match(logits, boxes, targets)
    assert sorted(matches.query.tolist()) == [0, 1, 2, 3]
    logits, boxes, targets = random_case(1, [0], 4, 2)
    assert len(match(logits, boxes, targets).query) == 0
