"""A Mask DINO finds in every engine what torch finds in real images, masks included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from detr.config import ClassMap, DetectorConfig
from detr.data import open_dataset
from detr.data.preprocess import PreprocessConfig
from detr.masks import intersection
from detr.model_info import ModelInfo
from detr.models import Detector, save_model
from detr.types import Detections
from engines import open_engine
from engines.bundle import Bundle
from engines.parity import Budget
from export.bundle import export_bundle
from export.parity.compare import compare_detections

IMAGES = 20


@pytest.fixture(scope="module")
def bundle(
    small_preset: Callable[..., DetectorConfig],
    build: Callable[[DetectorConfig], Detector],
    be_sure: Callable[[Detector], None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Bundle:
    folder = tmp_path_factory.mktemp("mask-dino")
    config = small_preset("mask-dino", **{"heads.masks.width": 16})
    detector = build(config)
    be_sure(detector)
    info = ModelInfo(
        detector=config,
        classes=ClassMap(names=("a", "b", "c"), category_ids=(1, 2, 3)),
        preprocess=PreprocessConfig(size=(128, 160)),
    )
    save_model(folder / "m.safetensors", detector, info)
    return export_bundle(folder / "m.safetensors", folder / "m.bundle", gate=False)


def shared_pixels(expected: list[Detections], found: list[Detections]) -> float:
    """IoU of all masks together, mask by mask in order of their boxes."""
    both = either = 0
    for one, other in zip(expected, found, strict=True):
        assert one.masks is not None and other.masks is not None
        # Equal scores may be in another order.
        order, others = (np.lexsort(x.boxes.round(1).T) for x in (one, other))
        for i, j in zip(order, others, strict=True):
            common = intersection(one.masks[i], other.masks[j]).area
            both += common
            either += one.masks[i].area + other.masks[j].area - common
    assert either > 10000
    return both / either


@pytest.mark.slow
def test_engines_find_the_masks_torch_finds(bundle: Bundle, shared_data: Path) -> None:
    data = open_dataset(f"coco:{shared_data / 'coco_mini'}:val")
    images = [data.image(i) for i in range(IMAGES)]
    torch_engine = open_engine(bundle, "torch")
    expected = [found for image in images for found in torch_engine([image])]
    for name in ("onnxruntime", "native", "openvino"):
        engine = open_engine(bundle, name)
        found = [one for image in images for one in engine([image])]
        parity = compare_detections(expected, found)
        assert parity.detections >= 5 * IMAGES, parity.summary()
        assert parity.violations(Budget(mask_iou=0.99, mask_iou_median=0.9999)) == [], name
        assert shared_pixels(expected, found) >= 0.999, name
