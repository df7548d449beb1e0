"""OpenVINO runs our kernel where there is one and the attention's body where there is none."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detr import msda
from detr.errors import UserError
from detr.points import Points
from detr.types import ImageArray
from engines import open_engine
from engines.openvino_engine import _openvino

MakeBundle = Callable[..., Path]


def pictures(count: int) -> list[ImageArray]:
    generator = np.random.default_rng(1)
    sizes = [(40, 60), (31, 48), (16, 90), (8, 8)]
    return [generator.integers(0, 255, (*sizes[i % 4], 3)).astype(np.uint8) for i in range(count)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """The output shapes of the kernel's calls, as they come."""
    seen: list[tuple[int, ...]] = []
    forward = msda.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        seen.append(tuple(out.shape))
        return out

    monkeypatch.setattr(msda, "forward", counted)
    yield seen


@pytest.mark.parametrize(("threads", "points"), [(None, 3), (1, 3), (2, 3), (1, (3, 1))], ids=str)
def test_kernel_finds_what_onnxruntime_finds(
    toy_bundle: MakeBundle, calls: list[tuple[int, ...]], threads: int | None, points: Points
) -> None:
    folder = toy_bundle(points=points)
    engine, reference = (open_engine(folder, name, threads) for name in ("openvino", "onnxruntime"))
    assert engine.versions["attention"] == f"kernel {msda.instruction_set()}"
    for count in (1, 3, 2):
        inputs = reference.prepare(pictures(count))
        calls.clear()
        a, b = engine.run(inputs), reference.run(inputs)
        assert calls == [(count, 5, 8)] * 2  # both attentions, and nothing else
        np.testing.assert_allclose(a.boxes, b.boxes, atol=1e-3)  # pixels
        np.testing.assert_allclose(a.scores, b.scores, atol=1e-5)
        np.testing.assert_array_equal(a.labels, b.labels)
        assert a.labels.dtype == np.int64 and a.boxes.shape == (count, 5, 4)


@pytest.mark.parametrize("lowering", ["gridsample", "gather"])
def test_body_where_there_is_no_kernel(
    toy_bundle: MakeBundle,
    calls: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
    lowering: str,
) -> None:
    folder = toy_bundle(lowering=lowering)
    monkeypatch.setattr(msda, "native_available", lambda: False)
    engine, reference = (open_engine(folder, name) for name in ("openvino", "onnxruntime"))
    assert engine.versions["attention"] == f"{lowering} body"
    for count in (1, 2):
        inputs = reference.prepare(pictures(count))
        a, b = engine.run(inputs), reference.run(inputs)
        np.testing.assert_allclose(a.boxes, b.boxes, atol=1e-3)  # pixels
        np.testing.assert_allclose(a.scores, b.scores, atol=1e-5)
    assert not calls


def test_static_batch(toy_bundle: MakeBundle) -> None:
    engine = open_engine(toy_bundle(batch=2), "openvino")
    assert engine.batch_size == 2
    pair, single = engine(pictures(2)), engine(pictures(1))
    assert len(single) == 1
    np.testing.assert_allclose(single[0].boxes, pair[0].boxes, atol=1e-3)
    with pytest.raises(UserError) as caught:
        engine(pictures(3))
    assert caught.value.code == "batch-too-large"


def test_results_outlive_the_next_run(toy_bundle: MakeBundle) -> None:
    engine = open_engine(toy_bundle(), "openvino")
    first = engine.run(engine.prepare(pictures(1)))
    kept = first.boxes.copy()
    engine.run(engine.prepare(pictures(2)[1:]))
    np.testing.assert_array_equal(first.boxes, kept)


@pytest.mark.slow
def test_closed_engine_leaves_nothing(toy_bundle: MakeBundle) -> None:
    def operators() -> int:
        gc.collect()
        return sum(type(x).__name__ == "MSDeformAttn" for x in gc.get_objects())

    before = operators()
    engine = open_engine(toy_bundle(), "openvino")
    engine(pictures(1))
    made = operators()
    assert made > before
    engine(pictures(1))
    assert operators() == made
    del engine
    assert operators() == before


def test_inner_values_outlive_an_engine_nobody_keeps(toy_bundle: MakeBundle) -> None:
    """In a process of its own, since a mistake here ends the process."""
    code = f"""
from pathlib import Path
from engines import open_engine
from engines.bundle import open_bundle
folder = Path({str(toy_bundle())!r})
inputs = open_engine(folder, "onnxruntime").prepare(open_bundle(folder).golden().images[:1])
print(open_engine(folder, "openvino").intermediates(inputs, ["first"])["first"].shape)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.stdout.startswith("(1, "), (run.returncode, run.stderr)


def test_unknown_device(toy_bundle: MakeBundle) -> None:
    with pytest.raises(UserError, match=r"openvino:QPU: no such device here, only .*CPU") as caught:
        open_engine(toy_bundle(), "openvino:QPU")
    assert caught.value.code == "openvino-device"


def test_devices_are_of_openvino_alone(toy_bundle: MakeBundle) -> None:
    with pytest.raises(UserError) as caught:
        open_engine(toy_bundle(), "onnxruntime:GPU")
    assert caught.value.code == "engine-unknown"


def test_openvino_missing(toy_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    _openvino.cache_clear()
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UserError, match=r"detr-distillery\[openvino\]") as caught:
        open_engine(toy_bundle(), "openvino")
    assert caught.value.code == "runtime-missing"
