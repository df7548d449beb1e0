"""Assignments between two models' predictions, against brute force and by hand."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from detr.models import cxcywh_to_xyxy
from distill.losses import linear_assignment as hungarian
from distill.losses.linear_assignment import assign
from distill.losses.overlap import giou
from distill.methods.parts import prediction_pairs as assignment
from distill.methods.parts.prediction_pairs import (
    PairWeights,
    Predictions,
    assign_parts,
    distances,
    pair_costs,
)

LN2 = math.log(2)


def random(problems: int, count: int, seed: int) -> Predictions:
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.rand(problems, count, 4, generator=generator) * 0.4 + 0.1
    return Predictions(torch.randn(problems, count, 3, generator=generator) * 2, boxes)


def test_distances_by_hand() -> None:
    # BCE(1/2, t) is ln 2 for every t; boxes [0,0,.4,.4] and [.2,0,.6,.4] have IoU 1/3.
    student = Predictions(torch.zeros(1, 2), torch.tensor([[0.2, 0.2, 0.4, 0.4]]))
    teacher = Predictions(torch.tensor([[3.0, -1.0]]), torch.tensor([[0.4, 0.2, 0.4, 0.4]]))
    found = distances(student, teacher).weighted(PairWeights(10, 5, 3))
    assert found["class"].item() == pytest.approx(10 * 2 * LN2)
    assert found["l1"].item() == pytest.approx(1.0)
    assert found["giou"].item() == pytest.approx(2.0, rel=1e-5)
    assert distances(student, teacher, mean=True).classes.item() == pytest.approx(LN2)


@pytest.mark.slow
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("block", [40, 10])  # two problems, or two rows of one, at a time
def test_costs_are_the_weighted_distances_of_every_pair(
    mean: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assignment, "_CACHED", block)
    student, teacher = random(3, 4, 0), random(3, 5, 1)
    weights = PairWeights(20, 5, 2, mean)
    costs = pair_costs(student, teacher, weights)
    assert costs.shape == (3, 4, 5)
    for p in range(3):
        for i in range(4):
            for j in range(5):
                parts = distances(
                    student[p : p + 1][(slice(None), slice(i, i + 1))],  # type: ignore[index]
                    teacher[p : p + 1][(slice(None), slice(j, j + 1))],  # type: ignore[index]
                    mean,
                ).weighted(weights)
                total = sum(float(v) for v in parts.values())
                assert float(costs[p, i, j]) == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("small", [10**9, 0])
def test_assignment_is_the_cheapest_of_all(small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hungarian, "_SMALL", small)  # with and without threads
    costs = torch.rand(4, 3, 5, generator=torch.Generator().manual_seed(2))
    problem, row, column = assign(costs)
    assert problem.tolist() == [p for p in range(4) for _ in range(3)]
    assert row.tolist() == [0, 1, 2] * 4
    for p in range(4):
        total = float(costs[p, row[problem == p], column[problem == p]].sum())
        best = min(
            sum(float(costs[p, i, c]) for i, c in enumerate(chosen))
            for chosen in permutations(range(5), 3)
        )
        assert total == pytest.approx(best)


def test_problems_of_different_sizes_ignore_their_filling() -> None:
    costs = torch.zeros(3, 3, 3)
    costs[0] = torch.tensor([[5.0, 1, -9], [1, 5, -9], [-9, -9, -9]])
    problem, row, column = assign(costs, torch.tensor([2, 0, 1]), torch.tensor([2, 3, 3]))
    assert problem.tolist() == [0, 0, 2]
    assert row.tolist() == [0, 1, 0] and column.tolist() == [1, 0, 0]
    nothing = assign(torch.zeros(0, 3, 3))
    assert all(len(x) == 0 for x in nothing)


@pytest.fixture(params=["native", "scipy"])
def solver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either way an installation may solve its problems."""
    if request.param == "scipy":
        monkeypatch.setattr(hungarian, "_native", None)


@pytest.mark.usefixtures("solver")
def test_a_square_problem_with_cheap_columns_is_solved_exactly() -> None:
    costs = torch.rand(3, 5, 5, generator=torch.Generator().manual_seed(4))
    priced = costs + 100 * torch.arange(5.0)  # no assignment avoids a column
    assert torch.equal(assign(costs)[2], assign(priced)[2])


@pytest.mark.slow
@pytest.mark.usefixtures("solver")
@pytest.mark.parametrize(
    ("height", "width"), [(1, 1), (1, 9), (9, 1), (64, 64), (65, 130), (130, 65), (200, 200)]
)
@pytest.mark.parametrize("kind", ["even", "ties", "negative", "dear"])
def test_no_assignment_is_cheaper(height: int, width: int, kind: str) -> None:
    costs = torch.rand(2, height, width, generator=torch.Generator().manual_seed(height + width))
    if kind == "ties":
        costs = (3 * costs).floor()
    elif kind == "negative":
        costs = 1e3 * (costs - 0.5)
    elif kind == "dear":  # the matcher's price of what nobody should get
        costs[:, ::2, ::3] = 1e6
    problem, row, column = assign(costs)
    for p in range(2):
        ours, theirs = row[problem == p], column[problem == p]
        assert len(set(ours.tolist())) == len(set(theirs.tolist())) == min(height, width)
        assert ours.tolist() == sorted(ours.tolist())
        table = costs[p].double().numpy()
        best = table[linear_sum_assignment(table)].sum()
        assert table[ours, theirs].sum() == pytest.approx(best, rel=1e-12, abs=1e-9)


@pytest.mark.usefixtures("solver")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_problem_without_an_answer_is_refused(value: float) -> None:
    with pytest.raises(ValueError):
        assign(torch.full((1, 3, 3), value))


@pytest.mark.parametrize("chunk", [1, 2**21])
def test_parts_are_assigned_as_if_alone(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assignment, "_CHUNK", chunk)
    student, teacher = random(1, 9, 0)[0], random(1, 8, 1)[0]
    weights = PairWeights(1, 5, 2)
    rows = torch.tensor([[0, 1, 2, 3], [4, 0, 0, 0], [5, 6, 0, 0]])
    columns = torch.tensor([[0, 1, 0], [2, 3, 4], [5, 0, 0]])
    sizes = torch.tensor([4, 1, 2]), torch.tensor([2, 3, 1])
    row, column = assign_parts(student, teacher, rows, columns, sizes, weights)
    wanted = set()
    for p in range(3):
        mine, theirs = rows[p, : sizes[0][p]], columns[p, : sizes[1][p]]
        table = pair_costs(student[mine[None]], teacher[theirs[None]], weights)
        _, i, j = assign(table)
        wanted |= set(zip(mine[i].tolist(), theirs[j].tolist(), strict=True))
    assert set(zip(row.tolist(), column.tolist(), strict=True)) == wanted
    assert len(row) == 4


def test_equal_predictions_are_assigned_to_themselves() -> None:
    student = random(2, 6, 3)
    _, row, column = assign(pair_costs(student, student, PairWeights(1, 5, 2)))
    assert row.tolist() == column.tolist()
    same = giou(cxcywh_to_xyxy(student.boxes), cxcywh_to_xyxy(student.boxes))
    torch.testing.assert_close(same, torch.ones(2, 6))
