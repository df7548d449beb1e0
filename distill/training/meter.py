"""What training steps take and report: means over steps, waiting time, memory."""

from __future__ import annotations

import resource
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

T = TypeVar("T")


class Meter:
    """Means of what the steps report, and where the time goes."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)
        self._steps, self._begin = 0, time.perf_counter()

    def timed(self, wait: Callable[[], T]) -> T:
        """Calls ``wait`` and counts its time as waiting for data."""
        begin = time.perf_counter()
        result = wait()
        self._sums["wait_ms"] += (time.perf_counter() - begin) * 1e3
        return result

    def add(self, values: Mapping[str, float]) -> None:
        """Counts one step."""
        self._steps += 1
        for name, value in values.items():
            self._sums[name] += value

    def means(self) -> dict[str, float]:
        """Means per step since the last call, with the wall time ``ms``; starts afresh."""
        self._sums["ms"] = (time.perf_counter() - self._begin) * 1e3
        means = {name: value / self._steps for name, value in self._sums.items()}
        self._start()
        return means


def peak_megabytes(device: torch.device) -> float:
    """Most memory this process ever held: on its GPU, or resident where it has none."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
