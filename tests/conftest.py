"""Fixtures for every room."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from detr import msda
from detr.config import DetectorConfig

# Before torch is imported: detectors of a few thousand weights spend a second thread's time on
# waiting for it, several times their own where anything else runs on the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What requirements.lock brings to every machine. A test skipped for want of one of them would hide
# a broken installation.
_INSTALLED = (
    "av", "hypothesis", "ml_dtypes", "mlflow", "onnxruntime", "onnxscript", "openvino",
    "pycocotools", "pynvml", "ray", "safetensors", "scipy", "tensorboard", "timm", "torch",
    "torchvision", "transformers", "wandb",
)  # fmt: skip


def pytest_configure() -> None:
    """Stops before the first test where `make install` did not do what it should."""
    wanted = [*_INSTALLED]
    if sys.platform == "linux":
        wanted.append("cuda")
        if platform.machine() == "x86_64":  # there are no wheels for others
            wanted.append("tensorrt_rtx")
    missing = [name for name in wanted if find_spec(name) is None]
    if not msda.native_available():
        missing.append("the compiled kernel detr.msda._native")
    if find_spec("distill.losses._assignment") is None:
        missing.append("the compiled solver distill.losses._assignment")
    if platform.machine() == "x86_64" and find_spec("detr.winograd._native") is None:
        missing.append("the compiled convolutions detr.winograd._native")
    if missing:
        raise pytest.UsageError(f"not installed: {', '.join(missing)}; run make install")


@pytest.fixture(autouse=True)
def _process_stays() -> Iterator[None]:
    """A test that asks for threads, or trains, does not leave what that sets to those after it."""
    before = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None
    yield
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        wanted = int(os.environ["OMP_NUM_THREADS"]) if before is None else before
        if torch.get_num_threads() != wanted:
            torch.set_num_threads(wanted)
        torch.set_flush_denormal(False)  # training flushes denormal numbers, for the whole process


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real KITTI and COCO samples; tests that want it are skipped without it.

    Looked for in ``$DETR_TEST_DATA`` and, failing that, in ``shared/data`` beside the checkout.
    """
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("DETR_TEST_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}")
    return folder


@pytest.fixture(scope="session")
def small_preset() -> Callable[..., DetectorConfig]:
    """Builds the config of a family's detector, of a few thousand weights: ``make(family, ...)``.

    Everything is the family's own but width, depth and numbers of queries; further changes are
    those of :meth:`DetectorConfig.replace`. A family without encoder layers stays without.
    """

    def make(family: str, backbone: Any = None, **changes: Any) -> DetectorConfig:
        from detr.presets import preset

        config = preset(f"{family}-r18", 3, pretrained=False)
        small: dict[str, Any] = {
            "width": 32,
            "attention_heads": 4,
            "encoder.layers": min(1, config.encoder.layers),
            "encoder.ffn": 48,
            "queries.number": 12,
            "decoder.layers": 2,
            "decoder.ffn": 48,
            "detections": 20,
        }
        if backbone is None or isinstance(backbone, dict):
            named = {"name": "test_resnet"} if backbone is None else backbone
            small["backbone"] = {"first_projection": False, **named}
        else:  # of another kind, which may need another neck
            changes["backbone"] = backbone
        if not config.encoder.layers:
            changes.pop("encoder.layers", None)
        if config.encoder.sampling_points:
            small["encoder.points"] = 2
        if points := config.decoder.cross_attention.sampling_points:
            equal = isinstance(points, int)
            small["decoder.cross_attention.points"] = 2 if equal else (1, 2, 1)
        if config.decoder.cross_attention.own_heads:
            small["decoder.cross_attention.heads"] = 8
        if hasattr(config.queries, "groups"):
            small["queries.groups"] = 3
        if getattr(config.queries, "one_to_many", None) is not None:
            small["queries.one_to_many"] = {"queries": 12, "repeat": 3}
        if config.queries.noise is not None:
            budget = "number" if config.queries.from_proposals else "groups"
            small[f"queries.denoising.{budget}"] = 4
        return config.replace(**small).replace(**changes)

    return make
