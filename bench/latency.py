"""How long an engine takes: engine only and end to end, on real images that change every time.

End to end is from decoded RGB pixels in memory to detections in memory: resize, normalize, run,
decode. Reading and decoding files is the camera's or the disk's time, not the detector's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import repeat
from time import perf_counter_ns
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

from bench.compare.statistics import speed_ratio
from detr.cli_support import progress
from detr.types import ImageArray
from engines.base import Engine

# A GPU takes a good part of a second to raise its clocks, in which a small model runs a hundred
# times.
WARM_SECONDS = 1.0
# What a busy machine may cost on top, to know a ratio.
MORE_SECONDS = 60.0
_LONGEST_TURN = 5


class Timing(BaseModel):
    """Times of one call, milliseconds; ``images_per_second`` follows from the mean."""

    mean_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    min_ms: float
    images_per_second: float


class Latency(BaseModel):
    """Latency of one engine.

    Attributes:
        engine: The forward pass alone, inputs prepared, outputs not yet interpreted.
        end_to_end: Preprocessing, forward pass and post-processing.
        device: The forward pass on the device's own clock, copies to and fro not counted; ``None``
            where the engine has no such clock.
        masks: The part of post-processing that brings masks to the images' size; ``None`` where
            there are none.
        count: Calls timed; all of them count, none is discarded.
        warmup: Calls before the first timed one.
        batch: Images per call.
        images: Different images in rotation.
        samples_ms: End-to-end time of every call in the order of the calls, milliseconds.
        turn: Calls in a row, before another artifact of the report had its turn.
    """

    engine: Timing
    end_to_end: Timing
    count: int
    warmup: int
    batch: int
    images: int
    samples_ms: list[float] = []
    turn: int | None = None
    device: Timing | None = None
    masks: Timing | None = None


class _Call(NamedTuple):
    """Nanoseconds of one call; ``masks`` is 0 where there are none."""

    engine: int
    end_to_end: int
    masks: int


def measure_latency(
    engine: Engine,
    images: Sequence[ImageArray],
    warmup: int = 5,
    iterations: int = 50,
    batch: int = 1,
    between: Callable[[], None] | None = None,
) -> Latency:
    """Times one engine; see :func:`measure_in_turns`.

    Raises:
        ValueError: No image, or no iteration.
    """
    watches = None if between is None else [between]
    return measure_in_turns([engine], images, warmup, iterations, batch, watches)[0]


def measure_in_turns(
    engines: Sequence[Engine],
    images: Sequence[ImageArray],
    warmup: int = 5,
    iterations: int = 50,
    batch: int = 1,
    between: Sequence[Callable[[], None]] | None = None,
    within: float | None = None,
) -> list[Latency]:
    """Times engines that take turns, so that a busy or warm machine is so for all of them.

    A turn is a few timed calls in a row, after one that is not timed: it wakes an engine's threads,
    puts those of the engine before it to sleep, and fills the caches. Who comes first changes from
    round to round. The calls of a round see the same images in every engine. Engine-only and
    end-to-end figures come from the same calls.

    Args:
        engines: What to time.
        images: ``[h, w, 3]`` uint8 RGB, taken in turn: a cache must not see one image only.
        warmup: Untimed calls first (allocations, lazy initialization); more where they take less
            than a second.
        iterations: Timed calls of each.
        batch: Images per call.
        between: For each engine, called between its timed calls and not timed, to watch the clocks.
        within: Take further turns, for a minute at most, until every ratio to the first engine is
            known to this share (half its 95 % interval). A machine at rest needs none.

    Raises:
        ValueError: No image, or no iteration.
    """
    if not engines or not images or iterations < 1 or batch < 1:
        raise ValueError("needs at least one image, one iteration and a batch of one")
    warm = [_warm_up(engine, images, warmup, batch) for engine in engines]
    times: list[list[_Call]] = [[] for _ in engines]
    length = turn_length(iterations)
    names = ", ".join(dict.fromkeys(engine.name for engine in engines))

    def take(calls: range, first: int) -> None:
        for place in range(len(engines)):
            k = (place + first) % len(engines)
            if len(engines) > 1:
                _call(engines[k], _turn(images, max(warm) + calls[0] - 1, batch))
            for call in calls:
                times[k].append(_call(engines[k], _turn(images, max(warm) + call, batch)))
                if between is not None:
                    between[k]()

    def turns(start: int, end: int) -> list[range]:
        return [range(k, min(k + length, end)) for k in range(start, end, length)]

    for number, calls in enumerate(progress(turns(0, iterations), f"timing {names}")):
        take(calls, number)
    until = perf_counter_ns() + 1e9 * MORE_SECONDS
    while within is not None and perf_counter_ns() < until and _uncertain(times, length, within):
        done = len(times[0])
        for number, calls in enumerate(turns(done, done + 10 * length)):
            take(calls, number)
    return [
        _latency(engine, np.array(taken, dtype=np.int64), count, batch, images, length)
        for engine, taken, count in zip(engines, times, warm, strict=True)
    ]


def _uncertain(times: Sequence[Sequence[_Call]], length: int, within: float) -> bool:
    """Whether the speed of an engine beside the first one is not known as closely as wanted."""
    first, *others = ([call.end_to_end for call in taken] for taken in times)
    found = [speed_ratio(first, other, length) for other in others]
    return any(x is not None and x.high - x.low > 2 * within * x.value for x in found)


def turn_length(iterations: int) -> int:
    """Timed calls of an engine in a row: few, and ten turns or more where there are ten calls."""
    return max(1, min(_LONGEST_TURN, iterations // 10))


def _warm_up(engine: Engine, images: Sequence[ImageArray], least: int, batch: int) -> int:
    warm = 0
    began = perf_counter_ns()
    for _ in progress(repeat(None), f"warming up {engine.name}"):
        if warm >= least and perf_counter_ns() - began >= 1e9 * WARM_SECONDS:
            break
        _call(engine, _turn(images, warm, batch))
        warm += 1
    return warm


def _call(engine: Engine, images: list[ImageArray]) -> _Call:
    began = perf_counter_ns()
    inputs = engine.prepare(images)
    ready = perf_counter_ns()
    raw = engine.run(inputs)
    done = perf_counter_ns()
    masks = raw.enlarged()
    enlarged = 0
    if masks is None:
        engine.finish(raw)
    else:
        enlarged = perf_counter_ns() - done
        engine.finish(raw, masks)
    return _Call(done - ready, perf_counter_ns() - began, enlarged)


def _latency(
    engine: Engine,
    times: npt.NDArray[np.int64],
    warmup: int,
    batch: int,
    images: Sequence[ImageArray],
    turn: int,
) -> Latency:
    count = len(times)
    inputs = engine.prepare(_turn(images, 0, batch))
    on_device = engine.device_times(inputs, count)
    return Latency(
        engine=summarize(times[:, 0], batch),
        end_to_end=summarize(times[:, 1], batch),
        masks=summarize(times[:, 2], batch) if times[:, 2].any() else None,
        count=count,
        warmup=warmup,
        batch=batch,
        images=min(len(images), count * batch),
        samples_ms=[round(ns / 1e6, 4) for ns in times[:, 1].tolist()],
        turn=turn,
        device=None if on_device is None else summarize(1e6 * np.array(on_device), batch),
    )


def _turn(images: Sequence[ImageArray], call: int, batch: int) -> list[ImageArray]:
    """The images of a call: all take turns."""
    return [images[(call * batch + k) % len(images)] for k in range(batch)]


def summarize(nanoseconds: npt.NDArray[Any], batch: int) -> Timing:
    """Mean, percentiles (linear between neighbors) and minimum of call times in nanoseconds."""
    ms = nanoseconds / 1e6
    p50, p90, p99 = np.percentile(ms, [50, 90, 99])
    return Timing(
        mean_ms=float(ms.mean()), p50_ms=float(p50), p90_ms=float(p90), p99_ms=float(p99),
        min_ms=float(ms.min()), images_per_second=float(1e3 * batch / ms.mean()),
    )  # fmt: skip
