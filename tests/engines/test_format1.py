"""Files written before verdicts, reports and builds had types of their own still load."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from detr.sidecar import read_sidecar
from engines.bundle import BundleInfo
from engines.evidence import EVIDENCE, Evidence, read_evidence
from engines.parity import Budget, Parity
from engines.precision_report import PrecisionReport
from engines.trt.layers import LayerReport
from engines.verdict import Deviation, EngineVerdict

FILES = Path(__file__).parent / "format1"


def evidence(name: str, folder: Path) -> Evidence:
    shutil.copy(FILES / f"{name}-evidence.json", folder / EVIDENCE)
    return read_evidence(folder)


def covers(model: Any, stored: Any) -> bool:
    """Whether a model, written again, says what a file said; keys were renamed, null was inf."""
    if isinstance(stored, dict):
        old = {"verdict": "comparison", "over": "violations", "artefact": "artifact"}
        return isinstance(model, dict) and all(
            covers(model.get(old.get(key, key), model.get(key)), value)
            for key, value in stored.items()
            if key != "format"
        )
    if isinstance(stored, list):
        return len(model) == len(stored) and all(map(covers, model, stored))
    return model == stored or (stored is None and model == "Infinity")


@pytest.mark.parametrize("name", ["fp32", "fp16", "int8"])
def test_a_bundle_loads_with_everything_it_said(name: str) -> None:
    path = FILES / f"{name}-bundle.json"
    info = read_sidecar(path, BundleInfo)
    stored = json.loads(path.read_text())
    written = json.loads(info.model_dump_json())
    for key in ("precision", "island", "precision_report", "parity", "files", "reference_ap"):
        assert covers(written[key], stored[key]), key
    assert info.parity is not None and info.parity.matched == stored["parity"]["matched"] > 0
    assert BundleInfo.model_validate_json(info.model_dump_json()) == info


def test_the_reports_of_a_precision_are_typed() -> None:
    reports = {
        name: read_sidecar(FILES / f"{name}-bundle.json", BundleInfo).precision_report
        for name in ("fp32", "fp16", "int8")
    }
    assert reports["fp32"] == PrecisionReport()
    search, comparison = reports["fp16"].search, reports["fp16"].comparison
    assert search is not None and search.complete and search.trials[0].change == "no island"
    assert search.trials[0].outcome.parity.images == 12
    assert comparison is not None and comparison.rows[-1].name == "fp16 searched island"
    comparison = reports["int8"].comparison
    assert reports["int8"].search is None and comparison is not None
    assert [row.precision for row in comparison.rows] == ["fp32", "fp16", "int8"]
    assert comparison.violations("int8"), "the row that was over its budget"
    assert "do not use int8" in reports["int8"].table()


@pytest.mark.parametrize("name", ["fp16", "int8", "stale-weight", "not-a-number", "engine"])
def test_evidence_loads_with_everything_it_said(name: str, tmp_path: Path) -> None:
    loaded = evidence(name, tmp_path)
    stored = json.loads((FILES / f"{name}-evidence.json").read_text())
    assert covers(json.loads(loaded.model_dump_json()), stored | {"build": stored["build"] or None})
    loaded.write(tmp_path)
    assert read_evidence(tmp_path) == loaded


def test_verdicts_are_typed(tmp_path: Path) -> None:
    verdict = evidence("stale-weight", tmp_path).verdicts["native"]
    assert (verdict.status, verdict.reference) == ("rejected", "torch")
    assert verdict.budget == Budget() and verdict.parity is not None
    assert verdict.deviation is not None and "value_proj" in verdict.deviation.layer
    assert verdict.pitfall is not None and verdict.pitfall.id == "other-weights"
    assert "first deviation: decoder.layers.0" in verdict.text()


def test_a_verdict_does_not_change(tmp_path: Path) -> None:
    verdict = evidence("stale-weight", tmp_path).verdicts["native"]
    with pytest.raises(ValidationError, match="frozen"):
        verdict.status = "accepted"  # type: ignore[misc]
    assert isinstance(verdict.notes, tuple) and isinstance(verdict.reasons, tuple)


def test_null_was_an_infinite_difference(tmp_path: Path) -> None:
    verdict = evidence("not-a-number", tmp_path).verdicts["onnxruntime"]
    assert verdict.deviation is not None and verdict.deviation.error == math.inf


def test_builds_and_layers_are_typed(tmp_path: Path) -> None:
    build = evidence("engine", tmp_path).build
    assert build is not None and build.compute_capabilities == (86, 89)
    assert build.batch == (1, 1, 4) and build.layers.count == 1166
    assert evidence("fp16", tmp_path).build is None, "a graph was not built"
    layers = read_sidecar(FILES / "engine-layers.json", LayerReport)
    assert len(layers.layers) == 6 and sum(layers.types.values()) == 6


def test_infinities_and_nan_come_back_from_json() -> None:
    verdict = EngineVerdict(
        engine="native", reference="torch", samples="", budget=Budget(box_px=math.inf),
        parity=Parity(max_score=math.nan), deviation=Deviation(layer="a", error=math.inf),
    )  # fmt: skip
    again = EngineVerdict.model_validate_json(verdict.model_dump_json())
    assert again.budget == verdict.budget and again.deviation == verdict.deviation
    assert again.parity is not None and math.isnan(again.parity.max_score)
