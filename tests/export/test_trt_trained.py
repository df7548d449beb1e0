"""A trained detector's whole way in half precision and int8: written, judged, accepted, built.

The other builds are of random weights, whose scores nearly tie, so that they can be built but not
judged.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

pytest.importorskip("tensorrt_rtx")

from detr.data.synth.scene import render
from detr.shipped import find_model
from engines.bundle import Precision
from engines.evidence import graph_evidence, trusted_artifact
from engines.trt import build as builder
from engines.trt.backend import BACKENDS
from engines.trt.build import BuildOptions, build_engine
from export import bundle as onnx_export
from export.bundle import export_bundle
from export.precision.apply import PrecisionRequest
from export.trace.torch_to_onnx import export_graph

RTX = BACKENDS["tensorrt-rtx"]
TEACHER = Path("demo-teacher")


@pytest.fixture(scope="module")
def traced() -> onnx.ModelProto:
    from engines.torch_engine import TorchEngine

    engine = TorchEngine(find_model(TEACHER))
    return export_graph(engine.detector, engine.info.preprocess.canvases[0], 17, 1, "gridsample")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_accepted_and_built(
    traced: onnx.ModelProto, precision: Precision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_export, "export_graph", lambda *_: traced)
    monkeypatch.setattr(builder, "compute_capability", lambda: None)
    scenes = [render((96, 320), 7, index).image for index in range(6)]
    calibration = scenes[4:] if precision == "int8" else ()
    bundle = export_bundle(
        find_model(TEACHER),
        tmp_path / "x.bundle",
        images=scenes[:4],
        request=PrecisionRequest(precision, calibration=calibration),
    )
    evidence = graph_evidence(bundle)
    assert evidence is not None and evidence.status == "accepted", evidence
    # ONNX Runtime computes half precision in float32 on a CPU; the emulation does not.
    assert set(evidence.verdicts) == {"onnxruntime", "half"}
    for verdict in evidence.verdicts.values():
        assert verdict.status == "accepted" and verdict.reference == "torch"
        assert verdict.parity is not None
        assert verdict.parity.detections >= 10 and verdict.parity.matched >= 10
    half = evidence.verdicts["half"].parity
    assert half is not None
    assert np.isfinite(half.max_score) and half.max_score > 1e-5, "nothing was rounded"

    built = build_engine(bundle, RTX, BuildOptions(compute_capabilities=(89,)))
    trusted = trusted_artifact(built.folder)
    assert trusted.evidence.bundle_sha256 == evidence.bundle_sha256
    assert trusted.evidence.build is not None
    assert trusted.evidence.build.precision == precision
    assert trusted.evidence.status == "unverified"  # it has not run: there is no GPU
    kinds = {kind for layer in built.layers.layers for kind in layer.outputs}
    assert kinds >= ({"HALF", "FLOAT", "INT8"} if precision == "int8" else {"HALF", "FLOAT"})
