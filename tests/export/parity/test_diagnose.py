"""A remedy is advised only where the bundle does not have it yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from detr.sidecar import read_sidecar
from engines.bundle import BundleInfo
from engines.parity import Parity
from engines.precision_report import PrecisionReport
from engines.verdict import Deviation, Pitfall
from export.parity.diagnose import diagnose, known_pitfalls, symptoms
from export.precision.half import DEFAULT_ISLAND

SEARCHED = Path(__file__).parents[2] / "engines" / "format1" / "fp16-bundle.json"
NORM = Deviation(layer="encoder.layers.0.norm", operators=("ReduceMean",))


def told(**changes: Any) -> str:
    info = read_sidecar(SEARCHED, BundleInfo).model_copy(update=changes)
    pitfall = diagnose(set(), NORM, NORM.operators, info, "half")
    assert pitfall is not None and pitfall.id == "layernorm-in-half"
    return pitfall.instead


def test_an_island_that_has_it_is_not_advised() -> None:
    default = told(island=DEFAULT_ISLAND, precision_report=PrecisionReport())
    assert "norm are in the float32 island already" in default
    assert "--search-islands --data DATA" in default


def test_an_island_that_was_searched_is_not_searched_again_on_the_same_images() -> None:
    searched = told()
    assert "not all of norm is in the float32 island" in searched
    assert "--search-islands" not in searched and "--precision fp32" in searched


def test_a_float32_graph_is_advised_no_island() -> None:
    assert "island" not in told(precision="fp32", island=())


@pytest.mark.parametrize("pitfall", known_pitfalls(), ids=lambda pitfall: pitfall.id)
def test_no_advice_speaks_of_an_island_of_its_own(pitfall: Pitfall) -> None:
    """No option sets an island, so only the search can be advised, by what the bundle has."""
    assert "island" not in pitfall.instead.lower()
    assert set(pitfall.island) <= set(DEFAULT_ISLAND)


def test_masks_are_at_fault_where_they_alone_differ() -> None:
    wrong = Parity(matched=20, min_mask_iou=0.2, median_mask_iou=0.8)
    assert symptoms(wrong) == {"masks"}
    assert symptoms(wrong.model_copy(update={"median_mask_iou": 1.0})) == set()
    # Half precision: a detection has come, and every mask differs by a few pixels.
    assert "masks" not in symptoms(wrong.model_copy(update={"extra": 1}))
