"""``bench op msda`` on a problem of a few cells."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from bench.op import contenders as msda_contenders
from bench.op import msda as op_msda
from bench.op.contenders import Contender, PeakMemory
from bench.op.msda import AttentionPreset, OpReport, make_inputs, op
from bench.op.replay import Replay, copies_needed
from detr import msda
from detr.errors import GateError, UserError


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op_msda, "_BURST_SECONDS", 0.0)
    monkeypatch.setitem(op_msda.PRESETS, "kitti-encoder", AttentionPreset(((6, 9), (3, 5))))
    monkeypatch.setitem(op_msda.PRESETS, "kitti-decoder", AttentionPreset(((6, 9), (3, 5)), 11))


def report(*arguments: str) -> OpReport:
    result = CliRunner().invoke(op, ["msda", *arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return OpReport.model_validate_json(result.stdout)


@pytest.mark.slow
def test_all_contenders_agree_and_are_compared() -> None:
    found = report("--preset", "kitti-decoder", "--threads", "1")
    assert (found.queries, found.threads, found.levels) == (11, 1, [(6, 9), (3, 5)])
    rows = {row.name: row for row in found.rows}
    assert set(rows) >= {"native", "native as torch op", "torch grid_sample"}
    assert {"onnxruntime GridSample", "onnxruntime gather", "openvino GridSample"} <= set(rows)
    base = rows["torch grid_sample"]
    for row in found.rows:
        if row.skipped is None:
            assert row.calls == 5 and row.error is not None and row.error < 1e-4
            assert row.forward_ms is not None and base.forward_ms is not None
            assert row.times_faster == pytest.approx(base.forward_ms / row.forward_ms)
    if msda.native_available():
        assert rows["native"].error is not None and rows["native"].error < 2e-5
        assert rows["native"].both_ms is not None
    assert found.environment.machine.packages["onnxruntime"]
    assert found.text().count("\n") >= len(rows)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_skips_those_who_cannot(dtype: str) -> None:
    rows = {row.name: row for row in report("--dtype", dtype, "--against", "gather").rows}
    assert set(rows) == {"native", "native as torch op", "onnxruntime gather"}
    assert rows["onnxruntime gather"].skipped == "takes part in float32 only"
    if msda.native_available():
        assert rows["native"].forward_ms is not None


@pytest.mark.slow
def test_a_wrong_output_is_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(problem: msda_contenders.AttentionInputs) -> Contender:
        wrong = np.zeros_like(problem.grad_out)
        return Contender(lambda: None, lambda: wrong, None, "broken 1")

    monkeypatch.setattr(msda_contenders, "native", broken)
    with pytest.raises(GateError, match="native: output is off"):
        op_msda.benchmark_msda("kitti-encoder", "float32", "cpu", set(), 1, 1)


def test_on_a_gpu_replays_are_timed_and_no_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch of ten microseconds is what Python takes to start it."""
    monkeypatch.setattr(op_msda, "_BURST_SECONDS", 10.0)
    taken = iter([3.0, 1.0] + [0.5] * 100)
    times = op_msda._burst(lambda: pytest.fail("timed from Python"), lambda: next(taken))
    assert times[:3] == [3.0, 1.0, 0.5] and len(times) == op_msda._BURST_CALLS


@pytest.mark.parametrize(
    ("size", "cache", "copies"),
    [(2**20, 50 * 2**20, 64), (29 * 2**20, 50 * 2**20, 5), (2**30, 2**20, 2), (0, 2**20, 64)],
)
def test_copies_leave_nothing_of_the_first_in_the_cache(size: int, cache: int, copies: int) -> None:
    assert copies_needed(size, cache) == copies
    assert copies == 64 or (copies - 1) * size >= 2 * cache


class FakeCuda:
    """As much of ``torch.cuda`` as a replay needs; what runs outside a graph is noted apart."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.graph_open = False
        self.clock = 0.0
        cuda = self

        class Graph:
            def replay(self) -> None:
                cuda.notes.append("replay")
                cuda.clock += 12.0

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = cuda.clock

            def synchronize(self) -> None: ...

            def elapsed_time(self, end: Any) -> float:
                return float(end.at - self.at)

        class Stream:
            def wait_stream(self, other: Any) -> None:
                assert other is not self

        self.CUDAGraph, self.Event, self.Stream = Graph, Event, Stream
        self.main = Stream()

    def current_stream(self) -> Any:
        return self.main

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        assert stream is not self.main, "warmed up on the default stream"
        yield

    @contextlib.contextmanager
    def graph(self, graph: Any) -> Iterator[None]:
        self.graph_open = True
        yield
        self.graph_open = False


def test_a_replay_records_every_copy_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda()
    monkeypatch.setattr(torch, "cuda", fake)
    seen: list[tuple[bool, str]] = []
    replay = Replay(lambda inputs: seen.append((fake.graph_open, inputs)), ["a", "b", "c", "d"])
    assert seen == [(False, "a")] * 3 + [(True, copy) for copy in "abcd"]
    assert fake.notes == ["replay"], "the first uploads the graph and is not counted"
    assert replay.milliseconds() == 3.0, "12 ms for four calls"


def test_encoder_samples_lie_around_their_query() -> None:
    problem = make_inputs("kitti-encoder", "float32", 2, 1)
    assert problem.locations.shape == (2, 69, 8, 2, 4, 2)
    first = problem.locations[:, 0, :, 0, :, 0] * 9 - 0.5  # in cells of the first level
    assert abs(float(first.mean())) < 1.5 and float(first.std()) == pytest.approx(2, rel=0.3)
    np.testing.assert_allclose(problem.weights.sum((3, 4)), 1, rtol=1e-5)


def test_cuda_without_a_device_is_one_line() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(UserError, match="no CUDA device"):
        op_msda.benchmark_msda("kitti-encoder", "float32", "cuda", set(), 1, 1)


def test_peak_memory_sees_what_was_freed_again() -> None:
    kept: list[Any] = []
    with PeakMemory() as peak:
        block = np.ones(40 * 2**20, np.uint8)
        kept.append(block.sum())
        del block
    if peak.bytes is None:
        pytest.skip("no resettable high-water mark here")
    assert 36 * 2**20 < peak.bytes < 80 * 2**20


@pytest.mark.slow
def test_json_is_json() -> None:
    result = CliRunner().invoke(op, ["msda", "--against", "gather", "--json"])
    assert json.loads(result.stdout)["preset"] == "kitti-encoder"
