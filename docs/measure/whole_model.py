"""Times an exported DINO ResNet-18 at 402x1333: our native engine against other runtimes.

    python docs/measure/whole_model.py [ENCODER_LAYERS DECODER_LAYERS]

Random weights, one bundle, all runtimes in one process in turns. The content queries are made
equal: with random weights proposals nearly tie, and an exchanged rank would exchange contents. Box
heads start at zero, so it is the scores that show whether the runtimes agree.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import torch

from detr.config import BackboneConfig, ClassMap, DetectorConfig
from detr.data import PreprocessConfig
from detr.model_info import ModelInfo
from detr.models import build_detector, save_model
from engines import open_engine
from export.onnx_export import export_bundle

ROUNDS, THREADS = 8, 2


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


def main() -> None:
    encoder, decoder = (int(x) for x in sys.argv[1:3]) if len(sys.argv) > 2 else (6, 6)
    with tempfile.TemporaryDirectory() as scratch:
        path = bundle(Path(scratch), encoder, decoder)
        engines = {n: open_engine(path, n, THREADS) for n in ("native", "onnxruntime")}
        image = np.random.default_rng(0).integers(0, 255, (375, 1242, 3), dtype=np.uint8)
        inputs = engines["native"].prepare([image])
        calls = {name: (lambda e=engine: e.run(inputs).scores) for name, engine in engines.items()}
        try:
            import openvino
        except ModuleNotFoundError:
            print("openvino: not installed")
        else:
            # OpenVINO's ONNX reader knows no model-local functions.
            plain = onnx.inliner.inline_local_functions(onnx.load(str(path / "model.onnx")))
            onnx.save(plain, Path(scratch) / "plain.onnx")
            model = openvino.compile_model(
                Path(scratch) / "plain.onnx", "CPU", {"INFERENCE_NUM_THREADS": THREADS}
            )
            feed = [inputs.images, inputs.valid_sizes, inputs.original_sizes]
            calls["openvino"] = lambda: model(feed)[1]
        expected = calls["onnxruntime"]()
        for name, call in calls.items():
            print(f"{name}: scores within {np.abs(call() - expected).max():.2g}")
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(ROUNDS):
            for name, call in calls.items():
                begin = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - begin)
    ours = statistics.median(seconds["native"])
    for name, times in seconds.items():
        middle = statistics.median(times)
        print(f"{encoder}/{decoder} {name}: {middle * 1e3:.0f} ms, {middle / ours:.2f} x native")


if __name__ == "__main__":
    main()
