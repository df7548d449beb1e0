"""Times exported detectors beside each other: what docs/which-detector.md is made of.

    python -m tools.which_detector --threads 2 --out docs/measured

Each family's detector at the size its COCO AP was published for, and all at one wide size, with
random weights, which cost what trained ones cost. Default engine of a CPU, float32, in turns, so
that a noisy minute meets all; processor time stands beside the clock's. AP is the publishers' and
was not measured here.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from bench.machine.environment import read_machine
from detr.cli_support import progress
from detr.data.cli import parse_size
from detr.plot import Point, ap_over_latency, standing_alone
from engines import Engine, open_engine
from export.bundle import export_bundle
from tools.random_weights import save_random
from tools.turns import Seconds, in_turns


@dataclass(frozen=True)
class Published:
    """A detector and the AP its authors give it.

    Attributes:
        preset: Name here.
        ap: On COCO val2017.
        size: Height and width it was measured at.
        before: What it was trained on before COCO, beside a backbone's own data.
    """

    preset: str
    ap: float
    size: tuple[int, int]
    before: str = ""


# Of the README files of lyuwenyu/RT-DETR, Peterande/D-FINE, Intellindust-AI-Lab/DEIMv2,
# Atten4Vis/LW-DETR, roboflow/rf-detr and detrex, and of QSKD's table 1 (DINO-R18). LARGE is the
# canvas of "short 800, long 1333".
SQUARE, LARGE = (640, 640), (800, 1344)
DETECTORS = (
    Published("d-fine-n", 42.8, SQUARE),
    Published("d-fine-s", 48.5, SQUARE),
    Published("d-fine-m", 52.3, SQUARE),
    Published("d-fine-l", 54.0, SQUARE),
    Published("deimv2-atto", 23.8, (320, 320)),
    Published("deimv2-femto", 31.0, (416, 416)),
    Published("deimv2-pico", 38.5, SQUARE),
    Published("deimv2-n", 43.0, SQUARE),
    Published("deimv2-s", 50.9, SQUARE, "DINOv3"),
    Published("rtdetr-r18", 46.5, SQUARE),
    Published("rtdetr-r34", 48.9, SQUARE),
    Published("rtdetr-r50", 53.1, SQUARE),
    Published("lwdetr-tiny", 42.6, SQUARE, "Objects365"),
    Published("lwdetr-small", 48.0, SQUARE, "Objects365"),
    Published("lwdetr-medium", 52.5, SQUARE, "Objects365"),
    Published("rfdetr-nano", 48.4, (384, 384), "Objects365"),
    Published("rfdetr-small", 53.0, (512, 512), "Objects365"),
    Published("deformable-detr-two-stage-r50", 48.2, LARGE),
    Published("dino-r18", 44.0, LARGE),
    Published("dino-r50", 50.6, LARGE),
)


@dataclass(frozen=True)
class Row:
    """What is written down of one detector at one size.

    Attributes:
        preset, ap, before: See :class:`Published`.
        size: Height and width it was timed at.
        published: Whether ``ap`` is of this size.
        parameters: Millions, query groups of the training included.
        ms, least_ms: Median and least of a call on the clock.
        processor_ms, processor_least_ms: The same of the processors' time together.
    """

    preset: str
    ap: float
    before: str
    size: tuple[int, int]
    published: bool
    parameters: float
    ms: float
    least_ms: float
    processor_ms: float
    processor_least_ms: float


def bundle(name: str, size: tuple[int, int], folder: Path) -> tuple[Path, float]:
    """An ungated bundle of a preset with random weights, and its parameters in millions."""
    folder.mkdir()
    detector = save_random(name, size, folder / "model.safetensors")
    path = export_bundle(folder / "model.safetensors", folder / "model.bundle", gate=False).path
    return path, sum(x.numel() for x in detector.parameters()) / 1e6


def measure(
    chosen: list[tuple[Published, tuple[int, int]]], threads: int, rounds: int
) -> tuple[list[Row], str]:
    """Times all in turns; returns the rows and the engine's name and version."""
    opened: list[tuple[Published, tuple[int, int], float, Engine]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for i, (one, size) in enumerate(progress(chosen, "exporting")):
            path, parameters = bundle(one.preset, size, Path(scratch) / str(i))
            opened.append((one, size, parameters, open_engine(path, threads=threads)))
    image = np.random.default_rng(0).integers(0, 255, (375, 1242, 3), dtype=np.uint8)
    runs = {
        str(i): partial(engine.run, engine.prepare([image]))
        for i, (_, _, _, engine) in enumerate(opened)
    }
    found = in_turns(runs, rounds)

    def ms(clock: str, i: int) -> Seconds:
        return Seconds(*(round(1e3 * x, 1) for x in found[clock][str(i)]))

    rows = [
        Row(
            one.preset,
            one.ap,
            one.before,
            size,
            size == one.size,
            round(parameters, 1),
            *ms("wall", i),
            *ms("processor", i),
        )
        for i, (one, size, parameters, _) in enumerate(opened)
    ]
    engine = opened[0][3]
    return rows, f"{engine.name} {engine.versions}"


def picture(rows: list[Row]) -> str:
    """Published AP over the processor time measured, as SVG."""

    def beaten(row: Row) -> bool:
        return any(
            other.ap >= row.ap and other.processor_ms <= row.processor_ms and other is not row
            for other in rows
        )

    colors = {
        "d-fine": "#2f6fb5",
        "deimv2": "#1f8f9c",
        "rtdetr": "#2a8c55",
        "dino": "#c4483d",
        "lwdetr": "#8a5aa8",
        "rfdetr": "#b07d2b",
    }
    points = [
        Point(
            row.preset,
            row.processor_ms,
            row.processor_least_ms,
            row.processor_ms,
            row.ap / 100,
            next((c for name, c in colors.items() if row.preset.startswith(name)), "#777777"),
            not beaten(row),
        )
        for row in rows
    ]
    axes = ("processor time of a call", "COCO AP as published")
    return standing_alone(ap_over_latency(points, axes=axes))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--wide", default="416x1344")
    parser.add_argument("--only", help="presets, by comma")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    wanted = [d for d in DETECTORS if not options.only or d.preset in options.only.split(",")]
    wide = parse_size(options.wide)
    pages = {"published": [(d, d.size) for d in wanted], "wide": [(d, wide) for d in wanted]}
    rows: list[Row] = []
    for name, chosen in pages.items():
        found, engine = measure(chosen, options.threads, options.rounds)
        rows += found
        (options.out / f"which-detector-{name}.svg").write_text(picture(found))
    machine = read_machine()
    document = {
        "command": f"python -m tools.which_detector --threads {options.threads} "
        f"--rounds {options.rounds}" + (f" --only {options.only}" if options.only else ""),
        "cpu": machine.cpu,
        "engine": engine,
        "threads": options.threads,
        "rows": [asdict(row) for row in rows],
    }
    (options.out / "which-detector.json").write_text(json.dumps(document, indent=1) + "\n")
    for row in rows:
        print(f"{row.preset:32} {row.size} {row.ap:5.1f} AP {row.processor_ms:8.0f} ms")


if __name__ == "__main__":
    main()
