"""A real-time detector that knows something loses nothing in half precision or int8, in any engine.

``tools/trained_gate.py`` does the same for the other families and keeps what it found.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.trained_gate import ENGINES, FAMILIES, PRECISIONS, judged

MEASURED = Path(__file__).parents[2] / "docs" / "measured" / "trained-gate.json"


@pytest.mark.slow
def test_nothing_is_lost(tmp_path: Path) -> None:
    rows = list(judged("rfdetr", 300, tmp_path))
    assert [(row["precision"], row["engine"]) for row in rows] == [
        (precision, engine) for precision in PRECISIONS for engine in ENGINES
    ]
    for row in rows:
        assert row["detections"] >= 10, row
        assert row["violations"] == [], row


def test_every_family_was_seen_to() -> None:
    rows = json.loads(MEASURED.read_text())["rows"]
    assert {(row["family"], row["precision"], row["engine"]) for row in rows} == {
        (family, precision, engine)
        for family in FAMILIES
        for precision in PRECISIONS
        for engine in ENGINES
    }
    assert not any(row["missing"] for row in rows)
    # With every value rounded, one box more than torch's 21 passes the threshold.
    over = {(row["family"], row["precision"], row["engine"]) for row in rows if row["violations"]}
    assert over <= {("d-fine", "int8", "half")}
