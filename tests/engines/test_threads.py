"""The number of threads a user or the environment gives arrives in every engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from detr import msda
from detr.errors import UserError
from engines.base import Engine
from engines.cli import predict
from engines.native_engine import NativeEngine
from engines.open import open_engine
from engines.openvino_engine import OpenVinoEngine
from engines.ort_engine import OrtEngine

MakeBundle = Callable[..., Path]
ENGINES = ("onnxruntime", "half", "native", "openvino")


def threads_of(engine: Engine) -> set[int]:
    """Threads of everything that computes in an engine."""
    if isinstance(engine, OrtEngine):
        return {engine._session.get_session_options().intra_op_num_threads}
    if isinstance(engine, NativeEngine):
        sessions = [piece._session for piece, _, _ in engine._steps]
        found = {one.get_session_options().intra_op_num_threads for one in sessions}
        return {*found, engine._threads or 0}
    assert isinstance(engine, OpenVinoEngine)
    compiled = engine._request(1).get_compiled_model()
    return {compiled.get_property("INFERENCE_NUM_THREADS")}


def available(name: str) -> None:
    if name == "openvino":
        pytest.importorskip("openvino")
    if name == "native" and not msda.native_available():
        pytest.skip("our kernel was not compiled")


@pytest.mark.parametrize("name", ENGINES)
def test_the_option_goes_before_the_environment(
    toy_bundle: MakeBundle, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    available(name)
    bundle = toy_bundle(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert threads_of(open_engine(bundle, name)) == {1}
    assert threads_of(open_engine(bundle, name, threads=2)) == {2}


def test_a_containers_quota_is_what_a_runtime_would_not_see(
    toy_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("detr.cores.cpu_quota", lambda: 0.5)
    assert threads_of(open_engine(toy_bundle(1), "onnxruntime")) == {1}


def test_an_engine_on_a_gpu_takes_no_threads(toy_bundle: MakeBundle, tmp_path: Path) -> None:
    image = tmp_path / "x.png"
    image.touch()
    command = [str(toy_bundle(1)), str(image), "--engine", "tensorrt", "--threads", "2"]
    result = CliRunner().invoke(predict, command)
    assert isinstance(result.exception, UserError)
    assert result.exception.code == "option-threads"
