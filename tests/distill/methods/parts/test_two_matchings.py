"""Matching distillation on cases small enough to work by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from detr.models import GroupOutput, QueryGroup, Target
from distill.losses.costs import MatchingCosts
from distill.losses.matcher import match, match_costs
from distill.losses.matches import Matches
from distill.losses.sets import set_losses
from distill.methods.parts.best_queries import best_queries, original_matches, stages
from distill.methods.parts.two_matchings import Rules, matching_losses, quality_focal_loss

Targets = Callable[..., Target]
LN2 = math.log(2)
COSTS = MatchingCosts()
ONE = torch.tensor(1.0)

# Four queries and two boxes: query 0 equals box 0; 1 overlaps it by a third; 2 and 3 equal box 1.
LEFT, SHIFTED, RIGHT = [0.2, 0.2, 0.4, 0.4], [0.4, 0.2, 0.4, 0.4], [0.8, 0.8, 0.2, 0.2]
BOXES = torch.tensor([[[LEFT, SHIFTED, RIGHT, RIGHT]]])


def pairs(*rows: tuple[int, int]) -> Matches:
    """(query, box) pairs of the only layer and image."""
    table = torch.tensor([(0, 0, q, b) for q, b in rows], dtype=torch.int64).reshape(-1, 4)
    return Matches(*table.unbind(1))


def losses(
    target: Targets,
    own: Matches,
    other: Matches | None,
    costs: torch.Tensor | None = None,
    logits: torch.Tensor | None = None,
    labels: tuple[int, int] = (0, 1),
    **rules: object,
) -> dict[str, float]:
    found = matching_losses(
        torch.zeros(1, 1, 4, 2) if logits is None else logits,
        BOXES,
        [target([LEFT, RIGHT], list(labels))],
        own,
        other,
        torch.zeros(1, 1, 4, 2) if costs is None else costs,
        ONE,
        Rules(**rules),  # type: ignore[arg-type]
    )
    return {key: value.item() for key, value in found.items()}


def test_equation_2_by_hand() -> None:
    # s = 1/2: BCE is ln 2 for every target.
    found = quality_focal_loss(torch.zeros(3), torch.tensor([0.0, 0.25, 0.5]))
    assert found.tolist() == pytest.approx([0.25 * LN2, 0.0625 * LN2, 0.0])
    # s = 3/4, t = 0: s^2 * -log(1 - s).
    found = quality_focal_loss(torch.tensor([math.log(3)]), torch.zeros(1))
    assert found.item() == pytest.approx(0.5625 * math.log(4), rel=1e-5)


def test_own_matches_alone_are_scored_by_their_iou(target: Targets) -> None:
    found = losses(target, pairs((1, 0), (2, 1)), None)
    # Two positives with targets 1/3 and 1, six zeros, all at s = 1/2.
    expected = ((1 / 3 - 0.5) ** 2 + 0.25 + 6 * 0.25) * LN2
    assert found["class"] == pytest.approx(expected, rel=1e-4)
    assert found["l1"] == pytest.approx(0.2, rel=1e-5)
    assert found["giou"] == pytest.approx(2 / 3, rel=1e-4)


def test_one_query_gets_two_classes_but_one_box(target: Targets) -> None:
    """Equation 3's second case: query 1 has box 0 itself and box 1 (another class) elsewhere."""
    found = losses(target, pairs((1, 0), (2, 1)), pairs((1, 1), (0, 0)))
    # Query 1 does not overlap box 1: target 0 there. Query 0 gets box 0's class at IoU 1.
    expected = ((1 / 3 - 0.5) ** 2 + 2 * 0.25 + 5 * 0.25) * LN2
    assert found["class"] == pytest.approx(expected, rel=1e-4)
    # Boxes: 1 -> box 0 (cost 0 ties, so the other's query 0 weighs w_d, at no distance), 2 -> 1.
    assert found["l1"] == pytest.approx(0.2, rel=1e-5)


def test_the_same_class_twice_keeps_the_own_iou(target: Targets) -> None:
    # Query 1 has box 0 (IoU 1/3) itself and box 1 (IoU 0) elsewhere, both of class 0.
    found = losses(target, pairs((1, 0), (2, 1)), pairs((1, 1)), labels=(0, 0))
    expected = ((1 / 3 - 0.5) ** 2 + 0.25 + 6 * 0.25) * LN2
    assert found["class"] == pytest.approx(expected, rel=1e-4)


def test_the_costlier_query_of_a_box_weighs_less(target: Targets) -> None:
    own, other = pairs((0, 0), (2, 1)), pairs((1, 0), (2, 1))
    costs = torch.zeros(1, 1, 4, 2)
    costs[0, 0, 1, 0] = 1.0  # the other's query is costlier
    found = losses(target, own, other, costs)
    assert found["l1"] == pytest.approx(0.51 * 0.2, rel=1e-5)
    assert found["giou"] == pytest.approx(0.51 * 2 / 3, rel=1e-4)
    costs[0, 0, 0, 0] = 2.0  # now the own query is; it has no error left to weigh
    assert losses(target, own, other, costs)["l1"] == pytest.approx(0.2, rel=1e-5)
    swapped = losses(target, other, own, costs)
    assert swapped["l1"] == pytest.approx(0.2, rel=1e-5)
    assert losses(target, own, other, costs, down_weight=1.0)["l1"] == pytest.approx(0.2)
    assert losses(target, own, other, costs, regression=False)["l1"] == 0
    # The lower weight of the classification, if asked for: query 0's entry, s = 1/2 against 1.
    plain = losses(target, own, other, costs)["class"]
    weighed = losses(target, own, other, costs, down_weight_classes=True)["class"]
    assert plain - weighed == pytest.approx(0.49 * 0.25 * LN2, rel=1e-3)


def test_conditional_matching_drops_poor_matches(target: Targets) -> None:
    own, other = pairs((0, 0), (2, 1)), pairs((1, 0), (3, 1))
    none = losses(target, own, None, classification="focal")
    some = losses(target, own, other, classification="focal", least_iou=0.5)
    # Of the other's pairs only (3, 1), IoU 1, is left: entry (3, class 1) turns positive.
    assert some["class"] - none["class"] == pytest.approx((0.0625 - 0.1875) * LN2, rel=1e-4)
    assert some["l1"] == none["l1"] == 0


def test_plain_focal_without_another_assignment_is_the_detection_loss(target: Targets) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 1, 4, 2, generator=generator)
    truth = [target([LEFT, RIGHT], [0, 1])]
    own = pairs((1, 0), (2, 1))
    found = losses(target, own, None, logits=logits, classification="focal")
    expected = set_losses(logits, BOXES, truth, own, ONE)
    for key, value in expected.items():
        assert found[key] == pytest.approx(value.item(), rel=1e-5)


def test_ignore_regions_and_fillers_are_silent(target: Targets) -> None:
    truth = target([LEFT], [0])
    truth.ignore = torch.tensor([[0.8, 0.8, 0.3, 0.3]])
    logits = torch.zeros(1, 1, 4, 1, requires_grad=True)
    padding = torch.tensor([[False, True, False, False]])
    matching_losses(
        logits, BOXES, [truth], pairs((0, 0)), pairs((2, 0)), torch.zeros(1, 1, 4, 1), ONE,
        Rules(), padding,
    )["class"].backward()  # fmt: skip
    assert logits.grad is not None
    # 0 is own, 2 the other's (in the region, but matched), 1 a filler, 3 in the region.
    assert (logits.grad.flatten() != 0).tolist() == [True, False, True, False]


def output(boxes: list[list[list[float]]]) -> GroupOutput:
    layers = [torch.tensor([b]) for b in boxes]
    count = layers[0].shape[1]
    hidden = [torch.arange(count * 4.0).reshape(1, count, 4) + 100 * i for i in range(len(layers))]
    group = QueryGroup("own", torch.zeros(1, count, 4), torch.zeros(1, count, 4))
    group.position = torch.arange(float(count))[None, :, None].expand(-1, -1, 4)
    return GroupOutput(group, [torch.zeros(1, count, 2) for _ in layers], layers, hidden, [])


def costs_of(teacher: GroupOutput, truth: list[Target]) -> torch.Tensor:
    return COSTS.matrix(torch.stack(teacher.logits), torch.stack(teacher.boxes), truth)


def test_best_queries_by_hand(target: Targets) -> None:
    teacher = output([[LEFT, SHIFTED, RIGHT, [0.7, 0.8, 0.2, 0.2]], [RIGHT, RIGHT, LEFT, SHIFTED]])
    truth = [target([LEFT, RIGHT], [0, 1])]
    chosen = best_queries(teacher, truth, costs_of(teacher, truth), 2)
    assert sorted(chosen.index[0, 0, :2].tolist()) == [0, 1]
    assert sorted(chosen.index[0, 0, 2:].tolist()) == [2, 3]
    assert chosen.index[1, 0, :2].tolist() == [2, 3]
    assert not chosen.padding.any() and chosen.stages == 2
    group = chosen.group("auxiliary", learned=True)
    assert group.blocks == 2 and group.content.shape == (1, 8, 4)
    # Block 1 starts with stage 2's query 2: its content there, its box, its learned position.
    torch.testing.assert_close(group.content[0, 4], teacher.hidden[1][0, 2])
    torch.testing.assert_close(group.reference[0, 4], torch.tensor(LEFT))
    assert group.position is not None and group.position[0, 4, 0] == 2
    assert chosen.group("auxiliary", learned=False).position is None


def test_fillers_of_images_with_fewer_boxes(target: Targets) -> None:
    teacher = output([[LEFT, SHIFTED, RIGHT, RIGHT]])
    for name in ("logits", "boxes", "hidden"):
        setattr(teacher, name, [torch.cat((x, x)) for x in getattr(teacher, name)])
    truth = [target([LEFT, RIGHT], [0, 1]), target([RIGHT], [1])]
    chosen = best_queries(teacher, truth, costs_of(teacher, truth), 2)
    assert chosen.padding.tolist() == [[False] * 4, [False, False, True, True]]
    logits, boxes = torch.randn(3, 2, 4, 2), torch.rand(3, 2, 4, 4)
    matches = match(logits, boxes, truth, COSTS, chosen.padding)
    assert all(
        q < 2 for q, i in zip(matches.query.tolist(), matches.image.tolist(), strict=True) if i == 1
    )


def test_original_matches_stay_or_are_made_anew(target: Targets) -> None:
    # Two equal boxes: both have queries 0 and 1 as their best, so both keep a match.
    truth = [target([LEFT, LEFT], [0, 0])]
    teacher = output([[LEFT, LEFT, RIGHT, RIGHT]])
    chosen = best_queries(teacher, truth, costs_of(teacher, truth), 2)
    found = original_matches(chosen, match_costs(chosen.costs, truth), truth, layers=2)
    assert found.layer.tolist() == [0, 0, 1, 1]
    for layer in (0, 1):
        here = found.layer == layer
        slots = found.query[here].tolist()
        queries = chosen.index[0, 0, slots].tolist()
        assert sorted(queries) == [0, 1] and found.box[here].tolist() in ([0, 1], [1, 0])
        assert all(
            slot // 2 == box for slot, box in zip(slots, found.box[here].tolist(), strict=True)
        )
    # With one query per box, both boxes chose the same one: the second match is lost and made anew.
    chosen = best_queries(teacher, truth, costs_of(teacher, truth), 1)
    if chosen.index[0, 0, 0] == chosen.index[0, 0, 1]:
        found = original_matches(chosen, match_costs(chosen.costs, truth), truth, layers=1)
        assert sorted(found.box.tolist()) == [0, 1] and sorted(found.query.tolist()) == [0, 1]


def test_stages_stand_like_layers() -> None:
    # Two student layers, two stages of three queries: value = 100 layer + 10 stage + query.
    layer, stage, query = torch.meshgrid(
        torch.arange(2), torch.arange(2), torch.arange(3), indexing="ij"
    )
    stacked = (100 * layer + 10 * stage + query).reshape(2, 1, 6, 1)
    assert stages(stacked, 2)[:, 0, 0, 0].tolist() == [0, 10, 100, 110]
