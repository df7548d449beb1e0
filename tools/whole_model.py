"""Times an exported DINO ResNet-18 at 402x1333 on the CPU in every engine that can run it.

    python -m tools.whole_model [--layers 6 6] [--threads 2] [--rounds 8] [--keep FOLDER]

Random weights, all engines in one process in turns: ours, and ONNX Runtime and OpenVINO on the
attention's GridSample body of the same bundle; and our default engine on an int8 bundle of the same
weights, the AP of which is another question (docs/precision.md). Beside the time on the clock
stands the processor time, which other processes on the machine change little. The content queries
are made equal: with random weights proposals nearly tie, and an exchanged rank would exchange
contents. Box heads start at zero, so it is the scores that show whether the engines agree.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from detr import msda
from detr.config import ClassMap
from detr.data import PreprocessConfig
from detr.model_info import ModelInfo
from detr.models import build_detector, save_model
from detr.presets import preset
from engines import Engine, open_engine
from engines.bundle import Precision
from export.bundle import export_bundle
from export.golden import drawn_images
from export.precision.apply import PrecisionRequest


def bundles(folder: Path, encoder: int, decoder: int) -> dict[Precision, Path]:
    """A float32 and an int8 bundle of the same weights; those in the folder, if they are there."""
    paths: dict[Precision, Path] = {x: folder / f"{x}.bundle" for x in ("fp32", "int8")}
    if all(path.exists() for path in paths.values()):
        return paths
    # What the measured figures were of: boxes up to the edges, proposals from inside alone.
    config = preset("dino-mmdet-r18", 7, pretrained=False).replace(
        encoder={"layers": encoder},
        queries={"proposal_tokens": "inside", "denoising": None},
        decoder={"layers": decoder},
        heads={"boxes": {"logit_eps": 1e-5}},
    )
    torch.manual_seed(0)
    detector = build_detector(config, pretrained=False).eval()
    with torch.no_grad():
        content = detector.get_parameter("source.content.weight")
        content.copy_(content[:1].expand_as(content))
    names = tuple(f"class{i}" for i in range(7))
    info = ModelInfo(
        detector=config,
        classes=ClassMap(names=names, category_ids=tuple(range(1, 8))),
        preprocess=PreprocessConfig(size=(402, 1333)),
    )
    save_model(folder / "model.safetensors", detector, info)
    drawn = drawn_images(info.preprocess.canvases[0])
    for precision, path in paths.items():
        request = PrecisionRequest(precision, calibration=drawn if precision == "int8" else ())
        # With random weights proposals nearly tie: the gate has nothing to hold int8 to.
        proved = precision == "fp32"
        weights = folder / "model.safetensors"
        export_bundle(weights, path, 17, 1, request=request, gate=proved)
    return paths


def engines(paths: Mapping[Precision, Path], threads: int) -> dict[str, Engine]:
    """Every engine, OpenVINO also as it is without our kernel."""
    path = paths["fp32"]
    found = {name: open_engine(path, name, threads) for name in ("native", "onnxruntime")}
    if find_spec("openvino") is None:
        print("openvino: not installed")
        return found
    found["openvino"] = open_engine(path, "openvino", threads)
    found["openvino, int8"] = open_engine(paths["int8"], "openvino", threads)
    with mock.patch.object(msda, "native_available", lambda: False):
        found["openvino, GridSample"] = open_engine(path, "openvino", threads)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, nargs=2, default=[6, 6])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--keep", type=Path, help="folder of bundles to take, or to keep them in")
    options = parser.parse_args()
    encoder, decoder = options.layers
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        paths = bundles(folder, encoder, decoder)
        compare(engines(paths, options.threads), options.rounds, f"{encoder}/{decoder}")


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
