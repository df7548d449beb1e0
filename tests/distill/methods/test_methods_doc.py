"""docs/methods.md speaks of files that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_the_files_it_names_are_there() -> None:
    rows = [row for row in (ROOT / "docs" / "methods.md").read_text().splitlines() if "|" in row]
    sources = {name for row in rows for name in re.findall(r"`([\w./]+\.(?:py|cpp))`", row)}
    assert len(sources) > 20
    tests = ROOT / "tests" / "distill" / "methods"
    places = (ROOT / "distill" / "methods", tests, tests / "parts", ROOT)
    missing = {name for name in sources if not any((p / name).is_file() for p in places)}
    assert not missing
