"""What the fuzzing tests share: how many inputs, odd values, and documents with a few of them.

``DETR_FUZZ=10000`` sets the number of inputs of each test, drawn anew at every run.
"""

from __future__ import annotations

import copy
import os
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

FUZZ = settings(
    max_examples=int(os.environ.get("DETR_FUZZ", "60")),
    deadline=None,
    database=None,
    derandomize="DETR_FUZZ" not in os.environ,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
    report_multiple_bugs=False,
)
# What files of real people hold, and what they should not.
ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**6), 10**6), st.integers(), st.floats(),
    st.text(max_size=6), st.sampled_from(["0", "1", "car", "nan", "1e400", "", "10", "-"]),
    st.lists(st.integers(-9, 99), max_size=5), st.dictionaries(st.text(max_size=3), st.none()),
)  # fmt: skip
NUMBER = st.one_of(
    st.sampled_from([0, 0.0, -0.0, 1e-9, 20, 40, 59.9999999, 60, 100, 101, 1e9, -5]), st.floats()
)


def changed(document: Any, draw: st.DataObject) -> Any:
    """A document with a few values replaced, removed or doubled."""
    document = copy.deepcopy(document)
    for _ in range(draw.draw(st.integers(1, 3))):
        here = document
        for _ in range(draw.draw(st.integers(0, 4))):
            below = list(here.values()) if isinstance(here, dict) else list(here)
            below = [value for value in below if isinstance(value, dict | list) and value]
            if not below:
                break
            here = draw.draw(st.sampled_from(below))
        if not here:
            continue
        keys = list(here) if isinstance(here, dict) else list(range(len(here)))
        key = draw.draw(st.sampled_from(keys))
        what = draw.draw(st.integers(0, 3))
        if what == 0:
            del here[key]
        elif what == 1 and isinstance(here, list):
            here.append(copy.deepcopy(here[key]))
        else:
            number = isinstance(here[key], int | float)
            here[key] = draw.draw(st.one_of(NUMBER, ODD) if number else ODD)
    return document


def spoilt(content: bytes, draw: st.DataObject) -> bytes:
    """A file with a few bytes replaced, put in or taken out, or cut off."""
    for _ in range(draw.draw(st.integers(1, 4))):
        at = draw.draw(st.integers(0, len(content)))
        put = draw.draw(st.one_of(st.binary(max_size=4), st.sampled_from([b"\0", b"\xff" * 4])))
        taken = draw.draw(st.one_of(st.just(len(put)), st.integers(0, 9)))
        content = content[:at] + put + content[at + taken :]
    return (
        content[: draw.draw(st.integers(0, len(content)))]
        if draw.draw(st.integers(0, 5)) == 0
        else content
    )


def row_of(draw: st.DataObject, good: list[str], names: list[str]) -> str:
    """A row of numbers and names with a few other ones."""
    row = list(good)
    for _ in range(draw.draw(st.integers(0, 4))):
        k = draw.draw(st.integers(0, len(row) - 1)) if row else 0
        value = draw.draw(st.one_of(NUMBER.map(repr), st.sampled_from(names), st.text(max_size=4)))
        row[k : k + draw.draw(st.integers(0, 2))] = [value]
    return " ".join(row)
