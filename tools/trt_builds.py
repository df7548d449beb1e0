"""Builds DINO ResNet-18 with TensorRT-RTX for GPUs that are not here: size, memory, layers.

    python -m tools.trt_builds [--layers 6 6] [--keep FOLDER] [--out docs/measured/trt-builds.json]

Random weights, batch 1, every precision, for SM 86, for SM 89 and for both in one engine. Nothing
runs: what is told is the builder's own account of memory and of the engine's layers. The file is
written after each build, so one that is stopped leaves those before it.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

from detr.files import write_atomic
from engines.bundle import open_bundle
from engines.trt.backend import BACKENDS, load
from engines.trt.build import BuildOptions, build_engine
from export.bundle import export_bundle
from export.precision.apply import PrecisionRequest
from tools.whole_model import bundles

TARGETS = ((86,), (89,), (86, 89))
PRECISIONS = ("fp32", "fp16", "int8")


def build(path: Path, targets: tuple[int, ...]) -> dict[str, Any]:
    """One build: MiB, layers and processor seconds."""
    begin = time.process_time()
    options = BuildOptions(compute_capabilities=targets)
    built = build_engine(open_bundle(path), BACKENDS["tensorrt-rtx"], options)
    made = built.build
    memory = made.memory_bytes
    return {
        "precision": made.precision,
        "compute_capabilities": made.compute_capabilities,
        "lowering": made.lowering,
        "engine_mib": round(made.bytes / 2**20, 1),
        "activation_mib": round(memory["activation"] / 2**20, 1),
        "weights_mib": round(memory["weights"] / 2**20, 1),
        "engine_layers": built.layers.count,
        "engine_layer_types": built.layers.types,
        "network_layers": len(built.layers.layers),
        "processor_seconds": round(time.process_time() - begin, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, nargs=2, default=[6, 6])
    parser.add_argument(
        "--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS, help="in this order"
    )
    parser.add_argument("--keep", type=Path, help="folder of bundles to take, or to keep them in")
    parser.add_argument("--out", type=Path, help="JSON to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        paths = dict(bundles(folder, *options.layers))
        paths["fp16"] = folder / "fp16.bundle"
        if "fp16" in options.precisions and not paths["fp16"].exists():
            request = PrecisionRequest("fp16")
            weights = folder / "model.safetensors"
            export_bundle(weights, paths["fp16"], 17, 1, request=request, gate=False)
        rows: list[dict[str, Any]] = []
        encoder, decoder = options.layers
        told = {
            "command": f"python -m tools.trt_builds --layers {encoder} {decoder}",
            "model": "DINO ResNet-18, FFN 2048, 900 queries, 402x1333, batch 1, random weights",
            "tensorrt_rtx": load(BACKENDS["tensorrt-rtx"]).__version__,
            "machine": platform.machine(),
            "builds": rows,
        }
        for precision in options.precisions:
            for targets in TARGETS:
                rows.append(build(paths[precision], targets))
                print(json.dumps(rows[-1]), flush=True)
                if options.out is not None:
                    write_atomic(options.out, json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
