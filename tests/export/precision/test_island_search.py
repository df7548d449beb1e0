"""The search finds the island that is needed, in few trials, and says what each part is worth."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, cast

import pytest
from onnx import ModelProto

from detr.errors import UserError
from engines.bundle import Precision
from engines.parity import Budget, Outcome, Parity
from engines.precision_report import IslandSearch, PrecisionComparison, PrecisionRow
from engines.torch_engine import TorchEngine
from export.parity.samples import Samples
from export.precision import apply as precise
from export.precision.apply import PrecisionRequest, write_precision
from export.precision.half import DEFAULT_ISLAND, TypedGraph
from export.precision.island_search import search_islands

PARTS = frozenset(
    f"{kind}:{stage}.{i}{tail}"
    for kind, tail in (("norm", ".norm"), ("softmax", ".attention"), ("module", ".ffn"))
    for stage in ("encoder", "decoder")
    for i in range(3)
) | {"geometry", "decode", "refinement:decoder.box_heads"}
BUDGET = Budget()


class Comparator:
    """Holds the budget where the needed parts are in the island."""

    def __init__(self, *needed: str) -> None:
        self.needed, self.asked = set(needed), 0

    def __call__(self, island: Collection[str]) -> Outcome:
        self.asked += 1
        assert set(island) <= PARTS
        missing = len(self.needed - set(island))
        parity = Parity(
            images=1, detections=10, matched=10, missing=missing, max_score=0.1 * missing
        )
        return Outcome(parity=parity)


def test_nothing_is_needed() -> None:
    comparator = Comparator()
    found = search_islands(PARTS, comparator, BUDGET)
    assert (found.island, found.complete, comparator.asked) == ((), True, 1)


@pytest.mark.parametrize(
    "needed",
    [
        ("decode",),
        ("norm:encoder.1.norm",),
        ("norm:encoder.1.norm", "softmax:decoder.0.attention", "refinement:decoder.box_heads"),
    ],
)
def test_exactly_what_is_needed_is_kept(needed: tuple[str, ...]) -> None:
    found = search_islands(PARTS, Comparator(*needed), BUDGET)
    assert found.complete and set(found.island) == set(needed)
    for part in needed:
        trial = next(x for x in found.trials if x.change == f"without {part}")
        assert not trial.holds and trial.outcome.parity.missing == 1
        assert f"without {part}" in found.table()


def test_an_island_larger_than_the_default_is_found() -> None:
    needed = ("module:encoder.2.ffn", "decode")
    found = search_islands(PARTS, Comparator(*needed), BUDGET)
    assert set(found.island) == set(needed)


def test_trials_are_bounded_and_what_was_not_tried_stays() -> None:
    comparator = Comparator("norm:encoder.1.norm", "softmax:decoder.0.attention")
    found = search_islands(PARTS, comparator, BUDGET, most=5)
    assert comparator.asked == 5 and not found.complete
    assert comparator.needed <= set(found.island)
    assert "stopped" in found.table()


def test_a_budget_no_island_holds_is_told() -> None:
    with pytest.raises(UserError) as caught:
        search_islands(
            PARTS, lambda _: Outcome(parity=Parity(detections=10, matched=1, missing=1)), BUDGET
        )
    assert caught.value.code == "island-budget" and "missing" in caught.value.message


def test_ap_counts_in_every_trial() -> None:
    """Boxes and scores within the budget are not enough where AP changes."""

    def comparator(island: Collection[str]) -> Outcome:
        ap = 0.5 if "decode" in island else 0.497
        return Outcome(parity=Parity(images=1, detections=10, matched=10), ap=ap, reference_ap=0.5)

    found = search_islands(PARTS, comparator, BUDGET)
    assert found.island == ("decode",)
    assert "AP -0.0030" in found.table()


@pytest.mark.parametrize("precision", ["fp16", "int8"])
@pytest.mark.parametrize(
    ("holds", "kept"),
    [("few images' island", ("decode",)), ("more images' island", ("norm",)), ("", DEFAULT_ISLAND)],
)
def test_an_island_that_fails_on_all_images_is_searched_again_and_gives_way(
    precision: Precision, holds: str, kept: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few images in half precision accepted it; what counts is the graph on all of them."""
    islands = {16: "decode", 96: "norm"}
    over = {"few images' island": [()], "more images' island": [("AP",), ()]}
    proofs = iter(over.get(holds, [("AP",), ("AP",)]))

    def write(_writer: object, island: Sequence[str]) -> TypedGraph:
        return TypedGraph(ModelProto(), tuple(island))

    def compare(variants: dict[str, ModelProto], *_: object) -> PrecisionComparison:
        proof = next(proofs)
        rows = [
            PrecisionRow(
                name=n, ap=0.5, cpu_ms=1, size_mb=1, violations=proof if "searched" in n else ()
            )
            for n in variants
        ]
        return PrecisionComparison(
            images=120, batch=1, engine="openvino", rows=tuple(rows), advice=()
        )

    def some(_request: object, _info: object, most: int) -> Samples:
        return Samples("", ["a"] * most, images=[0] * most)

    def search(_writer: object, samples: Samples) -> IslandSearch:
        return IslandSearch(island=(islands[len(samples)],), trials=(), complete=True)

    monkeypatch.setattr(precise, "value_ranges", lambda *_: {})
    monkeypatch.setattr(precise, "calibrate", lambda *_: {})
    monkeypatch.setattr(precise, "_samples", some)
    monkeypatch.setattr(precise._Writer, "_search", search)
    monkeypatch.setattr(precise._Writer, "_half", write)
    monkeypatch.setattr(precise._Writer, "_int8", write)
    monkeypatch.setattr(precise, "compare_precisions", compare)
    request = PrecisionRequest(precision, search=True, data=cast(Any, [0]))
    reference = cast(TorchEngine, type("Reference", (), {"info": type("I", (), {"preprocess": 0})}))
    written = write_precision(ModelProto(), reference, "gather", 1, [], request)
    assert written.island == kept and written.report.comparison is not None
    assert next(proofs, None) is None, "measured once per search"
    told = any("default island is kept" in line for line in written.report.comparison.advice)
    assert told == (kept == DEFAULT_ISLAND)
    name = f"{precision} {'default' if told else 'searched'} island"
    assert written.report.comparison.rows[-1].name == name, "the exported graph is told last"
