"""Calls timed in turns, on the clock and in processor time, so that a noisy minute meets all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Seconds(NamedTuple):
    """Of one call.

    Attributes:
        median, least: Over its rounds.
    """

    median: float
    least: float


def in_turns(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, Seconds]]:
    """Calls everything once a round.

    Args:
        runs: What to call, by name.
        rounds: How many count; one before them pays for allocations and the choice of kernels.

    Returns:
        For ``wall`` and ``processor`` the seconds by name.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            wall, spent = time.perf_counter(), time.process_time()
            run()
            times[name].append((time.perf_counter() - wall, time.process_time() - spent))
    found = {}
    for clock, label in enumerate(("wall", "processor")):
        counted = {name: [x[clock] for x in all_[1:]] for name, all_ in times.items()}
        found[label] = {n: Seconds(statistics.median(x), min(x)) for n, x in counted.items()}
    return found
