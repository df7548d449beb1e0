"""Faults of the field, put into a trained detector's export one at a time: the gate sees each."""

from __future__ import annotations

from pathlib import Path

import pytest

from detr.shipped import find_model
from engines.bundle import Bundle, open_bundle
from engines.ort_engine import OrtEngine
from engines.torch_engine import TorchEngine
from export.bundle import export_bundle
from export.parity.budget import default_budget
from export.parity.engines import engine_verdicts
from export.parity.samples import Samples
from tools.gate_faults import FAULTS, faulty_verdict, scenes


@pytest.fixture(scope="module")
def reference() -> TorchEngine:
    return TorchEngine(find_model(Path("demo-teacher")))


@pytest.fixture(scope="module")
def samples(reference: TorchEngine, tmp_path_factory: pytest.TempPathFactory) -> Samples:
    return scenes(tmp_path_factory.mktemp("scenes") / "data", 4, reference)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("healthy") / "demo.bundle"
    export_bundle(find_model(Path("demo-teacher")), out, batch="dynamic", gate=False)
    return open_bundle(out)


@pytest.mark.slow
def test_the_healthy_export_is_accepted(
    healthy: Bundle, reference: TorchEngine, samples: Samples
) -> None:
    verdict = engine_verdicts(
        healthy, reference, [OrtEngine(healthy)], samples, default_budget("fp32")
    )[0]
    assert verdict.status == "accepted", verdict.text()
    assert verdict.parity is not None and verdict.parity.detections >= 20
    assert verdict.ap is not None and verdict.ap > 0.2


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_rejected(
    name: str, healthy: Bundle, tmp_path: Path, reference: TorchEngine, samples: Samples
) -> None:
    fault = FAULTS[name]
    verdict = faulty_verdict(fault, healthy, tmp_path / "x.bundle", reference, samples)
    assert verdict.status == "rejected" and verdict.reasons
    layer = "" if verdict.deviation is None else verdict.deviation.layer
    assert layer.startswith(fault.layer), verdict.text()
    assert not fault.pitfall or (verdict.pitfall and verdict.pitfall.id == fault.pitfall), (
        verdict.text()
    )
