"""Timing several artifacts in one report: in turns, with an interval for each ratio."""

from __future__ import annotations

from collections.abc import Sequence

from bench.compare.statistics import speed_ratio
from bench.latency import Latency, measure_in_turns
from bench.machine.clocks import Watch, read_clocks
from bench.machine.environment import Environment, assess_environment, read_machine
from bench.opened import Artifact
from bench.report.model import Speed
from detr.types import ImageArray

# Kept decoded for the timing: enough to defeat a cache of one image, little enough for memory.
TIMED_IMAGES = 32
# How closely ratios are to be known.
WITHIN = 0.03


def time_in_turns(
    artifacts: Sequence[Artifact], images: Sequence[ImageArray], iterations: int
) -> tuple[list[Latency], list[Environment]]:
    """Times engines that take turns; latency and environment of each.

    Args:
        artifacts: What to time.
        images: ``[h, w, 3]`` RGB, in rotation.
        iterations: Timed calls of each.
    """
    engines = [artifact.engine for artifact in artifacts]
    watches = [Watch() for _ in engines]
    before = read_clocks()
    timings = measure_in_turns(
        engines, images, iterations=iterations, between=watches, within=WITHIN
    )
    after = read_clocks()
    return timings, [
        assess_environment(
            read_machine(engine.versions), before, after, watch.drift(), engine.on_gpu
        )
        for engine, watch in zip(engines, watches, strict=True)
    ]


def speed_beside(base: Latency, other: Latency) -> Speed | None:
    """How many times as fast the other is, where both took turns and there were enough of them."""
    found = speed_ratio(base.samples_ms, other.samples_ms, base.turn or 1)
    return None if found is None else Speed(value=found.value, low=found.low, high=found.high)
