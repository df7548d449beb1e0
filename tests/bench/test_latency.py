"""Timing: percentiles, rotation of images, what is timed."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from bench.latency import measure_in_turns, measure_latency, summarize, turn_length
from detr.data.preprocess import Inputs
from detr.masks import Rle
from detr.types import Detections
from engines.base import Engine, RawDetections


class SlowEngine(Engine):
    """Sleeps 1 ms preparing, 4 ms running, 2 ms finishing; notes what it was given."""

    name = "slow"
    batch_size = None

    def __init__(self) -> None:
        self.artifact = Path("none")
        self.versions = {}
        self.calls: list[list[int]] = []

    def prepare(self, images: object) -> Inputs:
        self.calls.append([int(image[0, 0, 0]) for image in images])  # type: ignore[attr-defined]
        time.sleep(0.001)
        return Inputs(*(np.zeros((1, 1), np.float32),) * 3)

    def _infer(self, inputs: Inputs) -> RawDetections:
        time.sleep(0.004)
        return RawDetections(np.zeros((1, 0, 4), np.float32), *(np.zeros((1, 0)),) * 2)  # type: ignore[arg-type]

    def finish(self, raw: RawDetections) -> list[Detections]:
        time.sleep(0.002)
        return []


def images(count: int) -> list[np.ndarray]:
    return [np.full((2, 2, 3), n, np.uint8) for n in range(count)]


def test_engine_only_and_end_to_end_are_apart() -> None:
    result = measure_latency(SlowEngine(), images(3), warmup=1, iterations=10)
    assert result.engine.min_ms >= 4
    assert result.end_to_end.min_ms >= 7
    assert result.end_to_end.min_ms - result.engine.min_ms >= 1
    assert (result.count, result.warmup, result.batch, result.images) == (10, 1, 1, 3)


class MasksEngine(SlowEngine):
    """Sleeps another 3 ms over its masks."""

    def _infer(self, inputs: Inputs) -> RawDetections:
        raw = super()._infer(inputs)

        class Raw(RawDetections):
            def enlarged(self) -> list[tuple[Rle, ...]]:
                time.sleep(0.003)
                return [()]

        return Raw(raw.boxes, raw.scores, raw.labels)

    def finish(self, raw: RawDetections, masks: object = None) -> list[Detections]:
        assert masks == [()], "enlarged a second time"
        return super().finish(raw)


def test_the_time_of_masks_is_a_part_of_it() -> None:
    result = measure_latency(MasksEngine(), images(3), warmup=1, iterations=10)
    assert result.masks is not None and result.masks.min_ms >= 3
    assert result.end_to_end.min_ms >= 10
    assert measure_latency(SlowEngine(), images(3), warmup=1, iterations=2).masks is None


def test_images_rotate_through_warm_up_and_timing() -> None:
    engine = SlowEngine()
    measure_latency(engine, images(3), warmup=2, iterations=3, batch=2)
    assert engine.calls[:5] == [[0, 1], [2, 0], [1, 2], [0, 1], [2, 0]]


def test_a_fast_engine_warms_up_for_a_time_and_not_for_a_few_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bench.latency.WARM_SECONDS", 0.2)
    began = time.monotonic()
    result = measure_latency(SlowEngine(), images(3), warmup=1, iterations=1)
    assert time.monotonic() - began >= 0.2
    assert 5 < result.warmup <= 200 / 7 + 1  # 7 ms at least each
    assert result.count == 1


def test_no_more_images_are_claimed_than_were_used() -> None:
    assert measure_latency(SlowEngine(), images(9), warmup=0, iterations=2).images == 2


def test_percentiles_are_interpolated_over_all_calls() -> None:
    timing = summarize(np.arange(1, 102) * 1_000_000, batch=2)
    assert (timing.p50_ms, timing.p90_ms, timing.p99_ms) == (51, 91, 100)
    assert (timing.min_ms, timing.mean_ms) == (1, 51)
    assert timing.images_per_second == pytest.approx(2 * 1000 / 51)
    one = summarize(np.array([3_000_000]), batch=1)
    assert one.p50_ms == one.p99_ms == one.min_ms == 3


def test_nothing_to_time_is_refused() -> None:
    for wrong in ({"images": []}, {"iterations": 0}, {"batch": 0}):
        with pytest.raises(ValueError, match="at least one"):
            measure_latency(SlowEngine(), **{"images": images(1), **wrong})  # type: ignore[arg-type]


def test_engines_take_turns_and_see_the_same_images() -> None:
    order: list[str] = []

    class Named(SlowEngine):
        def __init__(self, letter: str) -> None:
            super().__init__()
            self.letter = letter

        def prepare(self, images: object) -> Inputs:
            order.append(self.letter)
            return super().prepare(images)

    one, two = Named("a"), Named("b")
    found = measure_in_turns([one, two], images(7), warmup=1, iterations=30)
    # A warm-up call each; then rounds of an untimed and three timed calls, the first one changing.
    rounds = "".join(order)[2:82]
    assert turn_length(30) == 3
    assert rounds == ("aaaabbbb" + "bbbbaaaa") * 5
    assert one.calls[1:41] == two.calls[1:41]
    assert [result.count for result in found] == [30, 30]
    assert all(len(result.samples_ms) == 30 for result in found)


def test_a_turn_is_short() -> None:
    assert [turn_length(n) for n in (1, 9, 10, 20, 50, 1000)] == [1, 1, 1, 2, 5, 5]


def test_a_ratio_that_is_not_known_yet_costs_further_turns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bench.latency.MORE_SECONDS", 1.0)

    class Unsteady(SlowEngine):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.generator = np.random.default_rng(seed)

        def finish(self, raw: RawDetections) -> list[Detections]:
            time.sleep(0.03 * self.generator.random())
            return []

    def counts(within: float | None) -> list[int]:
        engines = [Unsteady(1), Unsteady(2)]
        found = measure_in_turns(engines, images(3), warmup=1, iterations=10, within=within)
        return [one.count for one in found]

    assert counts(None) == counts(1e9) == [10, 10]
    first, second = counts(0.01)
    assert first == second and first > 10
