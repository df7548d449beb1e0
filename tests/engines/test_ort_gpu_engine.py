"""ONNX Runtime's providers for GPUs, with a stand-in that computes on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from detr.errors import UserError
from engines import open_engine, ort_gpu_engine
from engines.bundle import Bundle
from engines.ort_gpu_engine import PROVIDERS

NAMES = list(PROVIDERS)


class Sessions:
    """Makes sessions on the CPU under another provider's name, and keeps what was asked."""

    def __init__(self, loads: bool = True) -> None:
        self.loads = loads
        self.asked: list[tuple[Any, Any]] = []

    def __call__(self, model: Any, options: Any, providers: list[Any]) -> Any:
        self.asked.append((model, providers))
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        name = providers[0][0] if self.loads else "CPUExecutionProvider"
        session.get_providers = lambda: [name, "CPUExecutionProvider"]  # type: ignore[method-assign]
        return session


def with_gpu(monkeypatch: pytest.MonkeyPatch, loads: bool = True) -> Sessions:
    sessions = Sessions(loads)

    class Runtime:
        __version__ = ort.__version__
        InferenceSession = sessions

        @staticmethod
        def get_available_providers() -> list[str]:
            return [provider.name for provider in PROVIDERS.values()]

    monkeypatch.setattr(ort_gpu_engine, "ort", Runtime)
    return sessions


@pytest.mark.parametrize("name", NAMES)
def test_without_the_provider_it_says_so(sized_bundle: Bundle, name: str) -> None:
    if PROVIDERS[name].name in ort.get_available_providers():
        pytest.skip("there is one")
    with pytest.raises(UserError, match=f"no {PROVIDERS[name].name}; install") as error:
        open_engine(sized_bundle.path, name)
    assert error.value.code == "runtime-missing" and "\n" not in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_it_answers_and_names_what_ran(
    sized_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    sessions = with_gpu(monkeypatch)
    engine = open_engine(sized_bundle.path, name)
    image = np.random.default_rng(0).integers(0, 256, (20, 36, 3), np.uint8)
    inputs = engine.prepare([image, image])
    wanted = open_engine(sized_bundle.path, "onnxruntime").run(inputs)
    found = engine.run(inputs)
    np.testing.assert_allclose(found.scores, wanted.scores, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.boxes, wanted.boxes, rtol=1e-4, atol=1e-3)
    assert engine.on_gpu and engine.name == name
    assert engine.versions["provider"] == PROVIDERS[name].name
    ((model, providers),) = sessions.asked
    assert providers == [(PROVIDERS[name].name, PROVIDERS[name].options), "CPUExecutionProvider"]
    if PROVIDERS[name].fused:  # its compiler gets the body that writes no samples out
        kinds = {node.op_type for node in onnx.load_model_from_string(model).graph.node}
        assert "GatherND" in kinds and "GridSample" not in kinds
        assert engine.versions["attention"] == "gather body"
    else:
        assert model == str(sized_bundle.model) and providers[0][1] == {"use_tf32": "0"}


@pytest.mark.parametrize("name", NAMES)
def test_a_provider_that_does_not_load_is_no_slower_run(
    sized_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with_gpu(monkeypatch, loads=False)
    with pytest.raises(UserError, match="did not load") as error:
        open_engine(sized_bundle.path, name)
    assert error.value.code == "runtime-missing"
