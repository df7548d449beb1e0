"""The search finds the island that is needed, in few trials, and says what each part is worth."""

from __future__ import annotations

from collections.abc import Collection

import pytest

from detr.errors import UserError
from export.islands import search_islands
from export.parity import Budget, Parity

PARTS = frozenset(
    f"{kind}:{stage}.{i}{tail}"
    for kind, tail in (("norm", ".norm"), ("softmax", ".attention"), ("module", ".ffn"))
    for stage in ("encoder", "decoder")
    for i in range(3)
) | {"geometry", "decode", "refinement:decoder.box_heads"}
BUDGET = Budget(detections=0)


class Judge:
    """Holds the budget where the needed parts are in the island."""

    def __init__(self, *needed: str) -> None:
        self.needed, self.asked = set(needed), 0

    def __call__(self, island: Collection[str]) -> Parity:
        self.asked += 1
        assert set(island) <= PARTS
        missing = len(self.needed - set(island))
        return Parity(images=1, matched=10, missing=missing, max_score=0.1 * missing)


def test_nothing_is_needed() -> None:
    judge = Judge()
    found = search_islands(PARTS, judge, BUDGET)
    assert (found.island, found.complete, judge.asked) == ((), True, 1)


@pytest.mark.parametrize(
    "needed",
    [
        ("decode",),
        ("norm:encoder.1.norm",),
        ("norm:encoder.1.norm", "softmax:decoder.0.attention", "refinement:decoder.box_heads"),
    ],
)
def test_exactly_what_is_needed_is_kept(needed: tuple[str, ...]) -> None:
    found = search_islands(PARTS, Judge(*needed), BUDGET)
    assert found.complete and set(found.island) == set(needed)
    for part in needed:
        trial = next(x for x in found.trials if x.change == f"without {part}")
        assert not trial.holds and trial.parity.missing == 1
        assert f"without {part}" in found.table()


def test_an_island_larger_than_the_default_is_found() -> None:
    needed = ("module:encoder.2.ffn", "decode")
    found = search_islands(PARTS, Judge(*needed), BUDGET)
    assert set(found.island) == set(needed)


def test_trials_are_bounded_and_what_was_not_tried_stays() -> None:
    judge = Judge("norm:encoder.1.norm", "softmax:decoder.0.attention")
    found = search_islands(PARTS, judge, BUDGET, most=5)
    assert judge.asked == 5 and not found.complete
    assert judge.needed <= set(found.island)
    assert "stopped" in found.table()


def test_a_budget_no_island_holds_is_told() -> None:
    with pytest.raises(UserError) as caught:
        search_islands(PARTS, lambda _: Parity(matched=1, missing=1), BUDGET)
    assert caught.value.code == "island-budget" and "missing" in caught.value.message
