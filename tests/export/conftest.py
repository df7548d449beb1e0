"""Random-weight detectors, small enough that an export takes seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from detr.config import (
    BackboneConfig,
    ClassMap,
    DecoderConfig,
    DeformableCrossAttentionConfig,
    DeformableEncoderConfig,
    DetectorConfig,
    Dinov2BackboneConfig,
    Dinov3BackboneConfig,
    DistributionRefinementConfig,
    GelanEncoderConfig,
    GroupedQueriesConfig,
    HybridEncoderConfig,
    LearnedQueriesConfig,
    LiteEncoderConfig,
    LookForwardTwiceConfig,
    MixedQueriesConfig,
    NeckConfig,
    PositionsConfig,
    ProjectorNeckConfig,
    ScaledBoxesConfig,
    SelectedQueriesConfig,
    TwoStageQueriesConfig,
    VitBackboneConfig,
)
from detr.data.preprocess import PreprocessConfig
from detr.model_info import ModelInfo
from detr.models import Detector, build_detector, save_model
from engines import open_engine
from engines.bundle import Bundle
from engines.parity import Budget
from export.bundle import export_bundle
from export.parity.compare import compare_detections

SIZE = (64, 96)
DINO = {"queries": MixedQueriesConfig(number=12), "decoder.final_norm": True}
RT_DETR = {
    "neck": NeckConfig(levels=3, group_norm=False, batch_norm=True),
    "positions": PositionsConfig(offset=-1.0, normalized=False),
    "encoder": HybridEncoderConfig(ffn=48, expansion=0.5, blocks=1),
    "queries": SelectedQueriesConfig(number=12, proposal_tokens="all"),
    "decoder.refinement": LookForwardTwiceConfig(),
}
D_FINE: dict[str, Any] = {
    **RT_DETR,
    "encoder": GelanEncoderConfig(ffn=48, expansion=0.5, blocks=1),
    "queries": SelectedQueriesConfig(number=12, proposal_tokens="all", position_limit=10),
    "decoder": {
        "layers": 3,
        "gated": True,
        "evaluated_layers": 2,
        "cross_attention": {"points": (1, 3, 2), "projections": False},
        "refinement": DistributionRefinementConfig(bins=8),
    },
}
DEIMV2 = {
    **D_FINE,
    "mlp_activation": "silu",
    "encoder": GelanEncoderConfig(ffn=48, expansion=0.5, blocks=1, join="sum", smooth=False),
    "queries": SelectedQueriesConfig(
        number=12,
        proposal_tokens="all",
        position_limit=10,
        position_layers=3,
        positions_stay=True,
        projected=False,
    ),
    "decoder": {
        **D_FINE["decoder"],
        "ffn": 24,
        "activation": "swiglu",
        "norm": "rms",
    },
}
LW_DETR = {
    "backbone": VitBackboneConfig(
        width=24, heads=4, side=5, windows=2, windowed=(0, 2), taps=(1, 3)
    ),
    "neck": ProjectorNeckConfig(scales=(2.0, 0.5), blocks=1),
    "encoder": DeformableEncoderConfig(layers=0),
    "queries": GroupedQueriesConfig(number=12, groups=3),
    "decoder": {"final_norm": True, "cross_attention": {"heads": 8, "points": 2}},
    "heads": {"boxes": ScaledBoxesConfig()},
}
DETECTORS: dict[str, dict[str, Any]] = {
    "lwdetr": LW_DETR,
    "rfdetr": {
        **LW_DETR,
        "backbone": Dinov2BackboneConfig(
            patch=8, width=24, heads=4, side=5, windows=2, windowed=(0, 1), taps=(1, 3)
        ),
        "neck": ProjectorNeckConfig(norm="layer", blocks=1),
    },
    "deformable": {},
    "deformable-refine": {"decoder.refinement.kind": "detach"},
    "deformable-two-stage": {
        "queries": TwoStageQueriesConfig(number=12),
        "decoder.refinement.kind": "detach",
    },
    "dino": {**DINO, "decoder.refinement": LookForwardTwiceConfig(shared_heads=True)},
    "dino-no-encoder": {
        **DINO,
        "decoder.refinement": LookForwardTwiceConfig(),
        "encoder.layers": 0,
    },
    "dino-masks": {
        **DINO,
        "decoder.refinement": LookForwardTwiceConfig(shared_heads=True),
        "heads.masks": {"width": 16, "channels": 16, "weigh_scores": True},
    },
    "rtdetr": RT_DETR,
    "d-fine": D_FINE,
    "deimv2": {
        **DEIMV2,
        "backbone": Dinov3BackboneConfig(
            width=24, heads=3, taps=(1, 2, 3), ffn=32, registers=2, detail=4, first_scale=0.5
        ),
    },
    "deimv2-lite": {
        **DEIMV2,
        "neck": NeckConfig(levels=2, group_norm=False, batch_norm=True, pooled=True),
        "backbone.strides": (16,),
        "encoder": LiteEncoderConfig(expansion=0.5, blocks=1),
        "decoder": {
            **DEIMV2["decoder"],
            "cross_attention": {"points": (3, 2), "projections": False},
            "refinement": DistributionRefinementConfig(bins=8, shared_boxes=True),
            "gated": False,
        },
    },
    "rtdetr-discrete": {**RT_DETR, "decoder.cross_attention.discrete": True},
    "rtdetr-unequal": {**RT_DETR, "decoder.cross_attention.points": [1, 3, 2]},
}

MakeCheckpoint = Callable[..., Path]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever traces a detector takes seconds, which its fixture takes and no test seems to."""
    for item in items:
        if {"checkpoint", "masks_bundle"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def be_sure() -> Callable[[Detector], None]:
    """Lets weights that know nothing score from 0.3 on, which is what counts for the gate."""

    def change(detector: Detector) -> None:
        with torch.no_grad():
            for name, parameter in detector.named_parameters():
                if "class_head" in name and name.endswith("bias"):
                    parameter.zero_()

    return change


@pytest.fixture(scope="session")
def build() -> Callable[[DetectorConfig], Detector]:
    """Builds a seeded detector whose boxes differ: fresh heads and offsets are zero."""

    def make(config: DetectorConfig) -> Detector:
        torch.manual_seed(1)
        detector = build_detector(config).eval()
        with torch.no_grad():
            for name, parameter in detector.named_parameters():
                if parameter.ndim == 2 or name.endswith("bias"):
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return detector

    return make


@pytest.fixture(scope="session")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory,
    build: Callable[[DetectorConfig], Detector],
    be_sure: Callable[[Detector], None],
) -> MakeCheckpoint:
    """Writes the checkpoint of one of :data:`DETECTORS`; the same file each time."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def make(name: str) -> Path:
        path = folder / f"{name}.safetensors"
        if path.exists():
            return path
        config = DetectorConfig(
            num_classes=3,
            width=32,
            attention_heads=4,
            backbone=BackboneConfig(name="test_resnet", strides=(8, 16)),
            neck=NeckConfig(levels=3),
            encoder=DeformableEncoderConfig(layers=1, ffn=48, points=2),
            queries=LearnedQueriesConfig(number=12),
            decoder=DecoderConfig(
                layers=2, ffn=48, cross_attention=DeformableCrossAttentionConfig(points=2)
            ),
            detections=20,
        ).replace(**DETECTORS[name])
        info = ModelInfo(
            detector=config,
            classes=ClassMap(names=("a", "b", "c"), category_ids=(1, 2, 3)),
            preprocess=PreprocessConfig(size=SIZE),
            provenance={"ap": 0.25},
        )
        detector = build(config)
        if config.heads.masks is not None:
            be_sure(detector)
        save_model(path, detector, info)
        return path

    return make


@pytest.fixture
def engines_agree() -> Callable[[Bundle], None]:
    """Holds that every engine on a CPU finds in whole, wide and high images what torch finds."""

    def hold(bundle: Bundle) -> None:
        generator = np.random.default_rng(5)
        # Whole canvases, a wide image and a high one: two of four leave padding.
        sizes = [SIZE, (33, 200), (90, 60), (128, 192)]
        images = [generator.integers(0, 255, (*size, 3)).astype(np.uint8) for size in sizes]
        wanted = [found for image in images for found in open_engine(bundle.path, "torch")([image])]
        # Random weights are timid: what counts is each image's best dozen.
        threshold = min(float(one.scores[11]) for one in wanted)
        budget = Budget(threshold=threshold, box_px=0.02, score=1e-5)
        for engine in ("onnxruntime", "native", "openvino"):
            found = [one for image in images for one in open_engine(bundle.path, engine)([image])]
            parity = compare_detections(wanted, found, budget)
            assert parity.detections >= 12 * len(wanted)
            assert parity.violations(budget) == [], engine

    return hold


@pytest.fixture(scope="session")
def masks_bundle(checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A DINO with masks of any batch; what tests change they copy first."""
    out = tmp_path_factory.mktemp("masks") / "masks.bundle"
    return export_bundle(checkpoint("dino-masks"), out, batch="dynamic")
