"""A road with one bright car per image, an engine that finds it, and reports made by hand."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import bench.opened as bench_opened
from bench.latency import Latency, Timing
from bench.machine.clocks import Clocks
from bench.machine.environment import Environment, assess_environment, read_machine
from bench.report.model import Example, Picture, Report, ReportRow
from detr.config import ClassMap, DetectorConfig
from detr.data.preprocess import Inputs, PreprocessConfig
from detr.metrics.coco_ap import ClassAp, CocoAp
from detr.metrics.kitti_ap import KittiAp, KittiClassAp, KittiLevel
from detr.model_info import ModelInfo
from engines.base import Engine, RawDetections

CLASSES = ClassMap(names=("Car", "Pedestrian"), category_ids=(1, 4))
LABEL_TAIL = "1.5 1.6 3.9 0 1.6 20 0"


@pytest.fixture(autouse=True)
def _warm_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.latency.WARM_SECONDS", 0.0)


class BrightBoxEngine(Engine):
    """Detects the bright rectangle of each image as a Car, ``shift`` pixels to the right."""

    name = "onnxruntime"

    def __init__(self, artifact: Path, shift: float = 0.0) -> None:
        self.artifact = artifact
        self.versions = {"onnxruntime": "0.0"}
        self.batch_size = None
        self.shift = shift
        self.seen: list[int] = []
        self.info = ModelInfo(
            detector=DetectorConfig(num_classes=len(CLASSES)),
            classes=CLASSES,
            preprocess=PreprocessConfig(size=(64, 128)),
        )

    def _infer(self, inputs: Inputs) -> RawDetections:
        boxes = np.zeros((len(inputs.images), 1, 4), dtype=np.float32)
        for i, image in enumerate(inputs.images):
            rows, columns = np.nonzero(image[0] > 1.5)
            boxes[i, 0] = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
            self.seen.append(int(columns.min()))
        boxes[:, :, [0, 2]] += self.shift
        shape = boxes.shape[:2]
        return RawDetections(boxes, np.full(shape, 0.9, np.float32), np.zeros(shape, np.int64))


@pytest.fixture
def engine_type() -> type[BrightBoxEngine]:
    return BrightBoxEngine


@pytest.fixture
def engines(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, engine_type: type[Any]
) -> dict[str, Any]:
    """``teacher`` finds every car, ``student`` 3 pixels beside it."""
    made: dict[str, Any] = {}
    for name, shift in (("teacher", 0.0), ("student", 3.0)):
        path = tmp_path / f"{name}.safetensors"
        header = f'{{"w":{{"dtype":"F32","shape":[5,7],"data_offsets":[0,140]}},"{name}":'
        header += '{"dtype":"F32","shape":[],"data_offsets":[140,144]}}'
        content = len(header).to_bytes(8, "little") + header.encode()
        path.write_bytes(content.ljust(7000, b"\0"))
        made[name] = engine_type(path, shift)
    monkeypatch.setattr(bench_opened, "open_engine", lambda path, engine, threads: made[path.stem])
    return made


@pytest.fixture
def bright_cars(tmp_path: Path) -> Path:
    """A KITTI folder of six 64 x 128 images, each with one car and a DontCare region."""
    root = tmp_path / "kitti"
    for folder in ("training/image_2", "training/label_2", "ImageSets"):
        (root / folder).mkdir(parents=True)
    for n in range(6):
        image = np.full((64, 128, 3), 60, dtype=np.uint8)
        x = 10 + 12 * n
        image[10:55, x : x + 30] = 250
        Image.fromarray(image).save(root / f"training/image_2/{n:06d}.png")
        (root / f"training/label_2/{n:06d}.txt").write_text(
            f"Car 0.00 0 0.0 {x} 10 {x + 30} 55 {LABEL_TAIL}\n"
            f"DontCare -1 -1 -10 0 0 5 5 -1 -1 -1 -1000 -1000 -1000 -10\n"
        )
    (root / "ImageSets/val.txt").write_text("".join(f"{n:06d}\n" for n in range(6)))
    return root


def make_row(name: str, ap: float, ms: float, kitti: bool = True) -> ReportRow:
    level = KittiLevel(ap11=ap, ap40=ap * 0.98, count=40)
    timing = Timing(
        mean_ms=ms * 1.02, p50_ms=ms, p90_ms=ms * 1.1, p99_ms=ms * 1.3, min_ms=ms * 0.95,
        images_per_second=1e3 / (ms * 1.02),
    )  # fmt: skip
    engine = timing.model_copy(update={"p50_ms": ms * 0.9})
    return ReportRow(
        name=name,
        engine="onnxruntime",
        precision="fp32",
        size_mb=12.5,
        artifact=f"runs/{name}.bundle",
        sha256=hashlib.sha256(name.encode()).hexdigest(),
        coco=CocoAp(
            ap=ap, ap50=min(1, ap * 1.5), ap75=ap, ap_small=None, ap_medium=ap, ap_large=ap,
            per_class={
                "Car": ClassAp(ap=ap, ap50=ap, count=70),
                "Pedestrian": ClassAp(ap=ap / 2, ap50=ap, count=12),
                "Tram": ClassAp(ap=None, ap50=None, count=0),
            },
            images=75,
            n_gt=82,
        ),
        kitti=KittiAp(
            per_class={
                "Car": KittiClassAp(overlap=0.7, easy=level, moderate=level, hard=level)
            },
            images=75,
        ) if kitti else None,
        latency=Latency(
            engine=engine, end_to_end=timing, count=50, warmup=5, batch=1, images=32
        ),
        environment=environment(),
    )  # fmt: skip


def environment() -> Environment:
    return assess_environment(read_machine({"onnxruntime": "1.2"}), Clocks(), Clocks())


@pytest.fixture
def report() -> Report:
    picture = Picture(title="ground truth", boxes=2, uri="data:image/jpeg;base64,AAAA")
    return Report(
        data="kitti:data:val",
        created="2026-01-02T03:04:05Z",
        reference="teacher",
        rows=[
            make_row("teacher", 0.5, 100.0),
            make_row("baseline", 0.4, 40.0),
            make_row("student", 0.48, 40.0),
        ],
        commands=["detr bench run teacher.bundle --data kitti:data:val"],
        examples=[Example(title="000003.png", pictures=[picture])],
    )
