"""The TensorRT runner against a stand-in for TensorRT and CUDA: buffers, graphs, batches, errors.

That the real libraries do what the stand-in does is for a machine with a GPU: ``make gpu-check``.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from detr.data.preprocess import Inputs
from detr.errors import UserError
from engines.bundle import open_bundle
from engines.trt.backend import BACKENDS
from engines.trt.cuda import CudaError, Device
from engines.trt.engine import TrtEngine

sys.path.insert(0, str(Path(__file__).parent))
from trt_stand_ins import Context, Cuda, Fake, FakeRtx

MakeBundle = Callable[..., Path]
Make = Callable[..., tuple[TrtEngine, Cuda, Fake]]


def inputs(count: int, seed: int = 0) -> Inputs:
    generator = np.random.default_rng(seed)
    return Inputs(
        generator.random((count, 3, 32, 48), np.float32),
        np.full((count, 2), 20, np.float32),
        generator.random((count, 2), np.float32),
    )


@pytest.fixture
def make(toy_bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def build(
        cuda: Cuda | None = None, name: str = "tensorrt", **changes: object
    ) -> tuple[TrtEngine, Cuda, Fake]:
        cuda = cuda or Cuda()
        module = (FakeRtx if name == "tensorrt-rtx" else Fake)(cuda)
        for key, value in changes.items():
            setattr(module, key, value)
        data = module.__dict__.pop("data", b"good")
        path = tmp_path / "model.engine"
        bundle = tmp_path / "toy.bundle"
        opened = open_bundle(bundle if bundle.exists() else toy_bundle())
        device = Device(cuda)
        engine = TrtEngine(opened, path, data, BACKENDS[name], module, device, "REBUILD")
        return engine, cuda, module

    return build


def test_answers_and_keeps_the_batch(make: Make) -> None:
    engine, _, _ = make()
    assert engine.batch_size is None
    for count in (2, 4, 1, 2):
        batch = inputs(count, seed=count)
        raw = engine.run(batch)
        assert raw.scores.shape == (count, 5) and raw.boxes.shape == (count, 5, 4)
        np.testing.assert_allclose(raw.scores[:, 0], batch.images.sum((1, 2, 3)), rtol=1e-5)
        np.testing.assert_array_equal(raw.boxes[:, 3, :2], batch.original_sizes)
        assert raw.labels.dtype == np.int64 and (raw.labels == 3).all()


def test_masks_are_a_further_output(make: Make, toy_bundle: MakeBundle) -> None:
    toy_bundle(masks=True)
    engine, _, _ = make(masks=True)
    for count in (3, 1):
        batch = inputs(count, seed=count)
        raw = engine.run(batch)
        assert raw.masks is not None and raw.masks.scaling.threshold == 0.5
        wanted = batch.images.sum(1)[:, ::4, ::4]
        np.testing.assert_allclose(raw.masks.logits[:, 2], wanted, rtol=1e-5)
        np.testing.assert_array_equal(raw.masks.original_sizes, batch.original_sizes)


def test_results_outlive_the_next_run(make: Make) -> None:
    engine, _, _ = make()
    first = engine.run(inputs(2, seed=1))
    kept = first.scores.copy()
    engine.run(inputs(2, seed=2))
    np.testing.assert_array_equal(first.scores, kept)


def test_runs_once_then_records_then_replays(make: Make) -> None:
    engine, cuda, _ = make()
    engine.run(inputs(2))
    uploads = ["upload 36864", "upload 16", "upload 16"]
    downloads = ["download 160", "download 40", "download 80"]
    first = [*uploads, "execute 2", *downloads, "wait", "record", "replay", "wait"]
    assert cuda.calls == first and engine.cuda_graph
    engine.run(inputs(2))
    assert cuda.calls == [*first, "replay", "wait"]


def test_another_batch_size_is_recorded_anew(make: Make) -> None:
    engine, cuda, _ = make()
    for count in (2, 3, 2):
        engine.run(inputs(count))
    assert cuda.calls.count("record") == 3
    assert cuda.calls.count("destroy graph") == 2, "a graph of other shapes was kept"


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_what_cannot_be_recorded_is_run_each_time(
    make: Make, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    engine, cuda, _ = make(Cuda(refuses_capture=name == "tensorrt"), name)
    if name == "tensorrt-rtx":
        monkeypatch.setattr(Context, "capturable", False)
    batch = inputs(2)
    for _ in range(2):
        raw = engine.run(batch)
        np.testing.assert_allclose(raw.scores[:, 0], batch.images.sum((1, 2, 3)), rtol=1e-5)
    assert not engine.cuda_graph and "replay" not in cuda.calls
    assert ("cudaErrorUnknown" if name == "tensorrt" else "compile") in engine.no_cuda_graph
    assert cuda.calls.count("execute 2") == 3
    assert cuda.calls.count("record") == (1 if name == "tensorrt" else 0)


def test_tensorrt_rtx_is_given_memory_and_keeps_what_it_compiled(
    make: Make, tmp_path: Path
) -> None:
    """What a run allocates cannot be recorded, and each process would compile anew."""
    engine, _, module = make(name="tensorrt-rtx")
    engine.run(inputs(2))
    assert engine.cuda_graph and module.caches == [b""]
    (kept,) = (tmp_path / "cache" / "detr-distillery").iterdir()
    assert kept.read_bytes() == b"kernels, compiled just now"
    _, _, module = make(name="tensorrt-rtx")
    assert module.caches == [b"kernels, compiled just now"]
    kept.write_bytes(b"of another release")
    engine, _, module = make(name="tensorrt-rtx")
    assert module.caches == [b""]
    engine.run(inputs(1))
    assert kept.read_bytes() == b"kernels, compiled just now"
    assert engine.profile_layers(inputs(2), runs=3) == {"conv": 2.0}


def test_a_cache_that_cannot_be_kept_costs_no_run(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    engine, _, _ = make(name="tensorrt-rtx")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    engine, _, _ = make(name="tensorrt-rtx")
    assert engine.run(inputs(2)).scores.shape == (2, 5)


@pytest.mark.parametrize("refuses", [False, True])
def test_the_devices_own_time_leaves_the_copies_out(make: Make, refuses: bool) -> None:
    engine, cuda, _ = make(Cuda(refuses_capture=refuses))
    assert engine.device_times(inputs(2), 3) == [1.0, 1.0, 1.0]
    timed = [call for call in cuda.calls[-4:] if call != "destroy graph"][-3:]
    assert timed == ["execute 2" if refuses else "replay"] * 3
    assert cuda.events == 0, "events were left behind"
    assert engine.run(inputs(2)).scores.shape == (2, 5)


def test_an_engine_that_refuses_to_be_recorded_is_run_each_time(make: Make) -> None:
    engine, cuda, _ = make(refuses_recording=True)
    batch = inputs(2)
    for _ in range(2):
        raw = engine.run(batch)
        np.testing.assert_allclose(raw.scores[:, 0], batch.images.sum((1, 2, 3)), rtol=1e-5)
    assert not engine.cuda_graph and engine.no_cuda_graph
    assert cuda.recording is None and "forget error" in cuda.calls


def test_a_batch_larger_than_the_profile(make: Make) -> None:
    engine, _, _ = make()
    with pytest.raises(UserError, match="batch of 5 images, but it was built for 1 to 4") as error:
        engine.run(inputs(5))
    assert error.value.code == "batch-too-large"
    assert "REBUILD --profile-batch 1,1,5" in str(error.value)
    assert engine.run(inputs(1)).scores.shape == (1, 5)


def test_a_batch_smaller_than_the_profile_is_filled_up(make: Make) -> None:
    engine, cuda, _ = make(batch=(2, 4))
    batch = inputs(1)
    raw = engine.run(batch)
    assert "execute 2" in cuda.calls and raw.scores.shape == (1, 5)
    np.testing.assert_allclose(raw.scores[:, 0], batch.images.sum((1, 2, 3)), rtol=1e-5)


def test_a_static_batch_is_filled_up_and_refused_beyond(make: Make) -> None:
    engine, cuda, _ = make(batch=(3, 3))
    assert engine.batch_size == 3
    assert engine.run(inputs(1)).scores.shape == (1, 5)
    assert "execute 3" in cuda.calls
    with pytest.raises(UserError, match="exported for 3"):
        engine.run(inputs(4))


def test_labels_of_another_integer_type(make: Make) -> None:
    engine, _, _ = make(labels=np.int32)
    raw = engine.run(inputs(2))
    assert raw.labels.dtype == np.int64 and (raw.labels == 3).all()


def test_what_is_not_an_engine_is_refused(make: Make) -> None:
    with pytest.raises(UserError, match=r"10\.16\.1\.11 does not take it \(not an engine\)") as e:
        make(data=b"bad")
    assert e.value.code == "engine-unloadable" and "REBUILD" in str(e.value)


def test_a_failed_run_says_what_tensorrt_said(make: Make) -> None:
    engine, _, _ = make(fails=True)
    with pytest.raises(RuntimeError, match="out of luck"):
        engine.run(inputs(1))


def test_layers_are_timed_outside_the_graph(make: Make) -> None:
    engine, cuda, _ = make()
    engine.run(inputs(2))
    assert engine.profile_layers(inputs(2), runs=3) == {"conv": 2.0}
    assert cuda.calls.count("execute 2") == 1 + 4
    assert engine.run(inputs(2)).scores.shape == (2, 5)


@pytest.mark.slow
def test_memory_is_counted_and_given_back(make: Make) -> None:
    engine, cuda, _ = make()
    assert engine.memory_bytes == 1000 + sum(len(b) for b in cuda.blocks.values()) // 2
    engine.run(inputs(1))
    del engine
    gc.collect()
    assert not cuda.blocks and {"destroy stream", "destroy graph"} <= set(cuda.calls)


def test_a_failed_call_is_not_swallowed() -> None:
    cuda = Cuda(refuses_capture=True)
    device = Device(cuda)
    with pytest.raises(CudaError, match="cudaErrorUnknown"):
        device.capture(lambda: None)
    assert cuda.recording is None


def test_the_bindings_have_every_call() -> None:
    bindings = pytest.importorskip("cuda.bindings.runtime")
    for name in vars(Cuda):
        if name.startswith("cuda"):
            assert hasattr(bindings, name), name
    assert bindings.cudaMemcpyKind.cudaMemcpyDeviceToHost == 2
    assert hasattr(bindings.cudaStreamCaptureMode, "cudaStreamCaptureModeThreadLocal")
