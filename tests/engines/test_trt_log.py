"""What a builder says: the lines that are kept, and its phases as one percentage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detr.cli_support import progress
from engines.trt.log import Log, Progress


def test_the_log_keeps_everything_but_the_verbose() -> None:
    log = Log()
    for severity in ("VERBOSE", "INFO", "WARNING", "ERROR", "INTERNAL_ERROR"):
        log.add(severity, f"a {severity}")
    assert [line.split(maxsplit=1)[1] for line in log.lines] == [
        "INFO: a INFO",
        "WARNING: a WARNING",
        "ERROR: a ERROR",
        "INTERNAL_ERROR: a INTERNAL_ERROR",
    ]
    assert log.errors == ["a ERROR", "a INTERNAL_ERROR"] and log.text().count("\n") == 4


def shares(steps: Sequence[tuple[Any, ...]]) -> list[float]:
    bar = progress(iter(()), "build", 100)
    watch = Progress(bar)
    seen = []
    for step in steps:
        {"start": watch.start, "step": watch.step, "finish": watch.finish}[step[0]](*step[1:])
        seen.append(bar.n)
    bar.close()
    return seen


def test_phases_within_phases_are_one_percentage() -> None:
    seen = shares(
        [
            ("start", "all", None, 4),
            ("step", "all", 0),
            ("start", "part", "all", 2),
            ("step", "part", 0),
            ("start", "detail", "part", 10),
            ("step", "detail", 4),
            ("finish", "detail"),
            ("finish", "part"),
            ("step", "all", 1),
            ("start", "part", "all", 2),  # once more, for another target
            ("finish", "part"),
            ("finish", "all"),
        ]
    )
    assert seen == [0, 25, 25, 37, 37, 43, 43, 43, 50, 50, 50, 100]


def test_phases_nobody_announced_do_no_harm() -> None:
    assert shares([("step", "unknown", 3), ("finish", "unknown")]) == [0, 0]
