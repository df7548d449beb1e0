"""What masks cost end to end: the same detector with and without, in turns.

    python -m tools.mask_cost [--size 96 320] [--size 402 1333] [--keep FOLDER] [--rounds 8]
        [--out docs/measured/mask-cost.json]

DINO ResNet-18 of 300 queries with random weights and a light mask head; its boxes are the same in
both. Exported at a canvas and run in the default engine on drawn scenes that fill it, from pixels
in memory to masks of the image's size in memory. Random masks have more and longer edges than
trained ones, which makes them dear to enlarge.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from detr.config import ClassMap, DetectorConfig
from detr.data import PreprocessConfig
from detr.data.synth.scene import render
from detr.files import write_atomic
from detr.model_info import ModelInfo
from detr.models import build_detector, save_model
from detr.presets import preset
from engines import Engine, open_engine
from export.bundle import export_bundle
from tools.turns import in_turns

MASKS = {"width": 64, "channels": 64}
SIZES = ([96, 320], [402, 1333])
_SCENES = 8


def bundles(folder: Path, size: tuple[int, int], detections: int) -> dict[str, Path]:
    """Bundles with and without masks, of the same weights otherwise; kept ones are taken."""
    plain = preset("dino-r18", 7, pretrained=False).replace(
        queries={"number": 300, "denoising": None}, detections=detections
    )
    configs = {"boxes": plain, "masks": plain.replace(heads={"masks": MASKS})}
    paths = {}
    weights: dict[str, torch.Tensor] = {}
    for name, config in configs.items():
        paths[name] = folder / f"{name}-{size[0]}x{size[1]}-{detections}.bundle"
        if paths[name].exists():
            continue
        torch.manual_seed(0)
        detector = build_detector(config, pretrained=False).eval()
        if weights:
            detector.load_state_dict(weights, strict=False)
        weights = weights or detector.state_dict()
        checkpoint = folder / f"{name}.safetensors"
        save_model(checkpoint, detector, _info(config, size))
        # With random weights proposals nearly tie; what is computed is another test's question.
        export_bundle(checkpoint, paths[name], gate=False)
    return paths


def _info(config: DetectorConfig, size: tuple[int, int]) -> ModelInfo:
    names = tuple(f"class{i}" for i in range(config.num_classes))
    return ModelInfo(
        detector=config,
        classes=ClassMap(names=names, category_ids=tuple(range(1, len(names) + 1))),
        preprocess=PreprocessConfig(size=size),
    )


def measure(paths: dict[str, Path], size: tuple[int, int], rounds: int) -> dict[str, Any]:
    """Milliseconds end to end of both, and of the parts that masks add to."""
    scenes = [render(size, 1, n).image for n in range(_SCENES)]
    engines = {name: open_engine(path) for name, path in paths.items()}
    prepared = {name: engine.prepare(scenes[:1]) for name, engine in engines.items()}
    raw = engines["masks"].run(prepared["masks"])
    turn = iter(range(10**9))

    def end_to_end(engine: Engine) -> None:
        engine([scenes[next(turn) // 2 % _SCENES]])

    runs: dict[str, Any] = {}
    for name, engine in engines.items():
        runs[f"{name}, end to end"] = lambda engine=engine: end_to_end(engine)
    for name, engine in engines.items():
        runs[f"{name}, engine alone"] = lambda e=engine, i=prepared[name]: e.run(i)
    runs["enlarging the masks"] = raw.enlarged
    # Random weights find small boxes: the same masks around objects a third as wide and as high as
    # the image.
    height, width = size
    third = np.array((width / 3, height / 3, 2 * width / 3, 2 * height / 3), np.float32)
    large = replace(raw, boxes=np.broadcast_to(third, raw.boxes.shape))
    runs["enlarging them, each a ninth of the image"] = large.enlarged
    found = in_turns(runs, rounds)
    times = {
        clock: {name: round(1e3 * x.median, 2) for name, x in found[clock].items()}
        for clock in ("wall", "processor")
    }
    sides = raw.boxes[0, :, 2:] - raw.boxes[0, :, :2]
    return {
        "canvas": list(size),
        "detections": raw.boxes.shape[1],
        "median_box": [round(float(v), 1) for v in statistics_of(sides)],
        "milliseconds": times,
        "cost": {
            clock: round(x["masks, end to end"] / x["boxes, end to end"] - 1, 3)
            for clock, x in times.items()
        },
    }


def statistics_of(sides: Any) -> list[float]:
    """Median width and height of boxes ``[N, 2]``."""
    return [statistics.median(column) for column in sides.T.tolist()]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, nargs=2, action="append")
    parser.add_argument("--detections", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--keep", type=Path, help="folder of bundles to take, or to keep them in")
    parser.add_argument("--out", type=Path, help="JSON to write")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for height, width in options.size or SIZES:
            paths = bundles(folder, (height, width), options.detections)
            rows.append(measure(paths, (height, width), options.rounds))
            print(json.dumps(rows[-1]), flush=True)
    told = {
        "command": "python -m tools.mask_cost",
        "model": f"DINO ResNet-18, 300 queries, mask head {MASKS}, random weights, batch 1",
        "machine": platform.machine(),
        "rows": rows,
    }
    if options.out is not None:
        write_atomic(options.out, json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
