"""Every family and kind of backbone exports, and ONNX Runtime finds what torch finds.

Whole bundles and engines are test_onnx_export's; here it is the graph alone, in two layers of a few
channels and on two levels where the family allows, because torch's exporter takes its time by node.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from click.testing import CliRunner

from detr.config import DetectorConfig
from detr.models import Detector
from detr.models.cli import model
from detr.presets import FAMILIES
from detr.types import Detections
from engines import open_engine
from engines.bundle import INPUTS
from engines.parity import Budget
from export.bundle import export_bundle
from export.parity.compare import compare_detections
from export.trace.torch_to_onnx import export_graph

SIZE = (64, 96)
SWIN = {"embed_dim": 8, "depths": (2, 1, 1, 1), "num_heads": (1, 1, 2, 2)}
BACKBONES: dict[str, dict[str, Any]] = {
    "swin": {"name": "swin_tiny_patch4_window7_224", "map_norm": True, "options": SWIN},
    "convnext": {
        "name": "convnext_atto",
        "options": {"dims": (8, 16, 32, 32), "depths": (1, 1, 1, 1)},
    },
    "mobilenetv4": {"name": "mobilenetv4_conv_small_035"},
    "hgnetv2": {"name": "hgnetv2_b0"},
}
# What a family's graph is exported with beside the family's own, several things at a time.
EXTRAS: dict[str, dict[str, Any]] = {
    "detr": {"backbone": BACKBONES["swin"]},
    "conditional-detr": {"backbone": BACKBONES["convnext"]},
    "dab-detr-patterns": {"backbone": BACKBONES["mobilenetv4"]},
    "dn-deformable-detr": {"backbone": BACKBONES["hgnetv2"]},
    "dab-detr": {"queries.random_centers": True},
    "deformable-detr-refine": {"encoder.fusion": "simple"},
    "deformable-detr-shared": {"encoder.fusion": "u"},
}
# A light mask head on detectors whose families have none.
WITH_MASKS = {f"{family} with masks": family for family in ("rtdetr", "d-fine")}
# Static batches take half the time of dynamic ones.
DYNAMIC = {"detr", "h-deformable-detr", "rtdetr"}


def config_of(family: str, small_preset: Callable[..., DetectorConfig]) -> DetectorConfig:
    """A family's detector with as few nodes as show what is its own."""
    config = small_preset(family, **EXTRAS.get(family, {}))
    if config.neck.levels != 4:
        return config
    return config.replace(**{"neck.levels": 2, "backbone.strides": (16, 32)})


def agree(wanted: list[Detections], found: list[Detections]) -> None:
    """Random weights are timid: what counts is each image's best dozen."""
    threshold = min(float(image.scores[11]) for image in wanted)
    budget = Budget(threshold=threshold, box_px=0.02, score=1e-5)
    parity = compare_detections(wanted, found, budget)
    assert parity.detections >= 12 * len(wanted)
    assert parity.violations(budget) == []


@pytest.mark.slow
@pytest.mark.parametrize("case", [*FAMILIES, *WITH_MASKS])
def test_runtimes_agree(
    case: str,
    small_preset: Callable[..., DetectorConfig],
    build: Callable[[DetectorConfig], Detector],
) -> None:
    family = WITH_MASKS.get(case, case)
    config = config_of(family, small_preset)
    if case in WITH_MASKS:
        config = config.replace(**{"heads.masks": {"width": 16, "channels": 16}})
    detector = build(config)
    batch = "dynamic" if family in DYNAMIC else 2
    graph = export_graph(detector, SIZE, 17, batch, "gridsample")
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    # A whole canvas and a padded one; for a dynamic batch padding on the other side, too.
    valid = torch.tensor([[64.0, 96.0], [40.0, 70.0], [64.0, 50.0]])[
        : 3 if family in DYNAMIC else 2
    ]
    images = torch.randn(len(valid), 3, *SIZE, generator=torch.Generator().manual_seed(5))
    for image, (height, width) in zip(images, valid.int().tolist(), strict=True):
        image[:, height:] = 0
        image[:, :, width:] = 0
    inputs = (images, valid, 2 * valid)
    with torch.no_grad():
        wanted = [x.numpy() for x in detector(*inputs)]
    feed = {name: x.numpy() for name, x in zip(INPUTS, inputs, strict=True)}
    found = session.run(None, feed)
    agree(
        [Detections(*x) for x in zip(*wanted[:3], strict=True)],
        [Detections(*x) for x in zip(*found[:3], strict=True)],
    )
    if detector.config.heads.masks is not None:
        # Detections whose scores tie may change places, and their masks with them.
        error = np.abs(wanted[3] - found[3]).max((2, 3))
        assert (error < 1e-3).mean() > 0.9
    assert len(found) == len(wanted)


@pytest.mark.slow
def test_extracted_layers_export(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """What ``detr model extract`` writes is a checkpoint like any other."""
    student = tmp_path / "student.safetensors"
    arguments = ["extract", str(checkpoint("deformable-refine")), "--encoder", "0"]
    arguments += ["--decoder", "1", "--out", str(student)]
    result = CliRunner().invoke(model, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    # Proves itself on drawn images.
    bundle = export_bundle(student, tmp_path / "student.bundle", batch=1)
    assert bundle.info.model.detector.decoder.layers == 1
    generator = np.random.default_rng(5)
    images = [
        generator.integers(0, 255, (*size, 3)).astype(np.uint8)
        for size in [(64, 96), (33, 200), (90, 60)]
    ]
    torch_engine, runtime = (open_engine(bundle.path, x) for x in ("torch", "onnxruntime"))
    wanted = [found for image in images for found in torch_engine([image])]
    agree(wanted, [found for image in images for found in runtime([image])])
