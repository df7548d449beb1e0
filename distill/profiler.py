"""Where a training step's time goes: named parts of the code, timed while somebody listens.

A part's time leaves out the parts within it, so the parts of a step add up to the step.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Literal, ParamSpec, TypeVar

import torch

Part = Literal[
    "student",
    "student_decoder",
    "teacher",
    "teacher_decoder",
    "queries",
    "matching",
    "losses",
    "backward",
    "optimizer",
]

P = ParamSpec("P")
R = TypeVar("R")


class Clock:
    """Adds up the seconds of parts between ``with clock:`` and its end.

    With one thread on a CPU it counts processor time, which other programs do not lengthen; else
    wall time, on a GPU from one empty queue to the next.

    Args:
        device: Where the step runs.

    Attributes:
        seconds: Of each part so far.
        processor: Whether it is processor time.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.processor = not self.cuda and torch.get_num_threads() == 1
        self.seconds: dict[str, float] = defaultdict(float)
        self._within: list[float] = []

    def __enter__(self) -> Clock:
        global _clock
        _clock = self
        return self

    def __exit__(self, *error: object) -> None:
        global _clock
        _clock = None

    def _now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.process_time() if self.processor else time.perf_counter()

    @contextlib.contextmanager
    def span(self, part: str) -> Iterator[None]:
        """Times what happens in it."""
        begin = self._now()
        self._within.append(0.0)
        try:
            yield
        finally:
            whole = self._now() - begin
            self.seconds[part] += whole - self._within.pop()
            if self._within:
                self._within[-1] += whole


_clock: Clock | None = None


def span(part: Part) -> contextlib.AbstractContextManager[None]:
    """A context whose time belongs to a part; free while no clock runs."""
    return contextlib.nullcontext() if _clock is None else _clock.span(part)


def timed(part: Part) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A function whose whole time belongs to a part."""

    def wrap(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def inner(*args: P.args, **kwargs: P.kwargs) -> R:
            with span(part):
                return function(*args, **kwargs)

        return inner

    return wrap
