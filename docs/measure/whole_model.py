"""Times an exported DINO ResNet-18 at 402x1333 on the CPU in every engine that can run it.

    python docs/measure/whole_model.py [--layers 6 6] [--threads 2] [--rounds 8] [--bundle KEPT]

Random weights, one bundle, all engines in one process in turns: ours, and ONNX Runtime and OpenVINO
on the attention's GridSample body. Beside the time on the clock stands the processor time, which
other processes on the machine change little. The content queries are made equal: with random
weights proposals nearly tie, and an exchanged rank would exchange contents. Box heads start at
zero, so it is the scores that show whether the engines agree.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from detr import msda
from detr.config import BackboneConfig, ClassMap, DetectorConfig
from detr.data import PreprocessConfig
from detr.model_info import ModelInfo
from detr.models import build_detector, save_model
from engines import Engine, open_engine
from export.onnx_export import export_bundle


def bundle(folder: Path, encoder: int, decoder: int) -> Path:
    config = DetectorConfig(
        num_classes=7,
        backbone=BackboneConfig(name="resnet18"),
        ffn=2048,
        encoder_layers=encoder,
        decoder_layers=decoder,
        queries=900,
        query="mixed",
        refine="look_forward_twice",
        pe_temperature=20.0,
        pe_offset=0.0,
        detections=300,
    )
    torch.manual_seed(0)
    detector = build_detector(config, pretrained=False).eval()
    with torch.no_grad():
        detector.source.content.weight.copy_(detector.source.content.weight[:1].expand(900, -1))
    names = tuple(f"class{i}" for i in range(7))
    info = ModelInfo(
        detector=config,
        classes=ClassMap(names=names, category_ids=tuple(range(1, 8))),
        preprocess=PreprocessConfig(size=(402, 1333)),
    )
    save_model(folder / "model.safetensors", detector, info)
    return export_bundle(folder / "model.safetensors", folder / "r18.bundle", 17, 1).path


def engines(path: Path, threads: int) -> dict[str, Engine]:
    """Every engine, OpenVINO also as it is without our kernel."""
    found = {name: open_engine(path, name, threads) for name in ("native", "onnxruntime")}
    if find_spec("openvino") is None:
        print("openvino: not installed")
        return found
    found["openvino"] = open_engine(path, "openvino", threads)
    with mock.patch.object(msda, "native_available", lambda: False):
        found["openvino, GridSample"] = open_engine(path, "openvino", threads)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, nargs=2, default=[6, 6])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--bundle", type=Path, help="take this bundle, or keep the one made here")
    options = parser.parse_args()
    encoder, decoder = options.layers
    with tempfile.TemporaryDirectory() as scratch:
        path = options.bundle
        if path is None or not path.exists():
            made = bundle(Path(scratch), encoder, decoder)
            path = made if path is None else Path(shutil.copytree(made, path))
        compare(engines(path, options.threads), options.rounds, f"{encoder}/{decoder}")


def compare(contenders: dict[str, Engine], rounds: int, title: str) -> None:
    image = np.random.default_rng(0).integers(0, 255, (375, 1242, 3), dtype=np.uint8)
    inputs = contenders["native"].prepare([image])
    expected = contenders["onnxruntime"].run(inputs).scores
    for name, engine in contenders.items():
        error = np.abs(engine.run(inputs).scores - expected).max()
        print(f"{name}: {engine.versions}, scores within {error:.2g}", flush=True)
    clock: dict[str, list[float]] = {name: [] for name in contenders}
    processor: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, engine in contenders.items():
            begin, begin_processor = time.perf_counter(), time.process_time()
            engine.run(inputs)
            clock[name].append(time.perf_counter() - begin)
            processor[name].append(time.process_time() - begin_processor)
    fastest = min(statistics.median(times) for times in clock.values())
    least = min(statistics.median(times) for times in processor.values())
    for name in contenders:
        wall, busy = statistics.median(clock[name]), statistics.median(processor[name])
        print(
            f"{title} {name}: {wall * 1e3:.0f} ms, {wall / fastest:.2f} x the fastest; "
            f"processor {busy * 1e3:.0f} ms, {busy / least:.2f} x the least"
        )


if __name__ == "__main__":
    main()
