"""Wrong masks beside right boxes: the gate sees each, and accepts what is right.

On weights that were never trained but score high: what is wrong with a mask shows there, too.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from detr.data.synth.scene import render
from engines.bundle import Bundle
from engines.evidence import read_evidence
from engines.open import open_engine
from engines.torch_engine import TorchEngine
from export.parity.gate import gate_bundle
from export.parity.samples import Samples
from tools.gate_faults import faulty_verdict
from tools.gate_mask_faults import MASK_FAULTS


@pytest.fixture(scope="module")
def samples(masks_bundle: Bundle) -> Samples:
    """Scenes that do not fill the canvas, with what torch finds in them."""
    images = [render((48 + 8 * n, 120), 5, n).image for n in range(4)]
    reference = open_engine(masks_bundle, "torch")
    found = [one for image in images for one in reference([image])]
    return Samples("scenes", [f"scene {n}" for n in range(4)], images=images, detections=found)


@pytest.fixture(scope="module")
def reference(masks_bundle: Bundle) -> TorchEngine:
    return open_engine(masks_bundle, "torch")


@pytest.mark.slow
def test_every_engine_is_accepted(masks_bundle: Bundle) -> None:
    assert masks_bundle.info.masks is not None and masks_bundle.info.outputs[-1] == "masks"
    parity = masks_bundle.info.parity
    assert parity is not None and parity.min_mask_iou is not None
    assert read_evidence(masks_bundle.path).status == "accepted"
    verdict = gate_bundle(masks_bundle, engines=["native", "openvino"])
    assert verdict.status == "accepted", verdict.text()
    for engine in verdict.engines:
        assert engine.parity is not None and engine.parity.detections >= 40
        assert engine.parity.min_mask_iou is not None and engine.parity.min_mask_iou >= 0.99
    assert "mask IoU from " in verdict.text()


@pytest.mark.slow
@pytest.mark.parametrize("name", MASK_FAULTS)
def test_every_fault_is_rejected(
    name: str, masks_bundle: Bundle, tmp_path: Path, reference: TorchEngine, samples: Samples
) -> None:
    fault = MASK_FAULTS[name]
    verdict = faulty_verdict(fault, masks_bundle, tmp_path / "x.bundle", reference, samples)
    assert verdict.status == "rejected"
    assert all("of a mask" in reason or "of masks" in reason for reason in verdict.reasons)
    assert verdict.deviation is not None and verdict.deviation.layer == "decode"
    assert verdict.pitfall is not None and verdict.pitfall.id == "masks"
