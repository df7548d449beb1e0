"""Builds presets with TensorRT-RTX for GPUs that are not here: size, memory, layers.

    python -m tools.trt_builds rtdetr-r18 d-fine-s --out docs/measured/trt-builds.json

Random weights, batch 1, every precision, for SM 86, for SM 89 and for both in one engine. Nothing
runs: what is told is the builder's own account of memory and of the engine's layers. It stops where
an engine does not hold every attention of the graph, a graph not one for every decoder layer that
answers and every encoder layer that samples, or a norm is not in float32. The file is written after
each detector and keeps the others' entries.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx

from detr.cli_support import progress
from detr.config import DetectorConfig
from detr.data.cli import parse_size
from detr.files import write_atomic
from detr.model_info import ModelInfo
from engines.bundle import Bundle, Precision, open_bundle
from engines.msda_function import is_attention
from engines.torch_engine import TorchEngine
from engines.trt.backend import BACKENDS, load
from engines.trt.build import BuildOptions, build_engine
from engines.trt.layers import LayerReport
from export.bundle import write_bundle
from export.golden import drawn_images
from export.precision.apply import PrecisionRequest
from export.trace.torch_to_onnx import export_graph
from tools.random_weights import save_random

TARGETS = ((86,), (89,), (86, 89))
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")
RTX = BACKENDS["tensorrt-rtx"]


def bundles(name: str, size: tuple[int, int], folder: Path) -> Iterator[Bundle]:
    """A preset in every precision, ungated, for random weights' scores nearly tie."""
    save_random(name, size, folder / "model.safetensors")
    engine = TorchEngine(folder / "model.safetensors")
    graph = export_graph(engine.detector, size, 17, 1, "gridsample")
    drawn = drawn_images(size)
    for precision in PRECISIONS:
        out = folder / f"{precision}.bundle"
        calibration = drawn if precision == "int8" else ()
        with progress(range(3), f"export {out.name}", 3) as bar:
            request = PrecisionRequest(precision, calibration=calibration)
            write_bundle(graph, engine, out, 17, 1, "gridsample", drawn, request, False, bar)
        yield open_bundle(out)


def attentions(bundle: Bundle) -> int:
    """Attention nodes of a graph.

    Raises:
        AssertionError: They are not as many as the layers that need one.
    """
    found = sum(map(is_attention, onnx.load(str(bundle.model)).graph.node))
    info = bundle.info.model
    assert isinstance(info, ModelInfo)  # it was exported from a checkpoint
    wanted = sampling_layers(info.detector)
    assert found == wanted, f"{bundle.path}: {found} attentions in {wanted} layers"
    return found


def sampling_layers(config: DetectorConfig) -> int:
    """Layers of a detector's exported graph that sample."""
    decoder = config.decoder
    inside = config.encoder.layers if config.encoder.sampling_points else 0
    return inside + (decoder.answering_layers if decoder.cross_attention.samples else 0)


def check_layers(report: LayerReport, count: int) -> None:
    """Looks for every attention and for the types of norms in what the builder was given.

    Raises:
        AssertionError: Something is missing.
    """
    # Four corners are looked up for each attention, by layers named after it.
    corners = [layer for layer in report.layers if "/gathernd" in layer.name]
    assert len(corners) == 4 * count, f"{len(corners)} corners of {count} attentions"
    norms = Counter(x.outputs[0] for x in report.layers if x.kind == "NORMALIZATION")
    assert set(norms) <= {"FLOAT"}, f"norms in {norms}"


def build(bundle: Bundle, targets: tuple[int, ...], count: int) -> dict[str, Any]:
    """One build: MiB, layers and seconds."""
    begin = time.process_time()
    built = build_engine(bundle, RTX, BuildOptions(compute_capabilities=targets))
    spent = time.process_time() - begin
    check_layers(built.layers, count)
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
        "network_layer_types": dict(
            Counter((x.outputs or ("none",))[0] for x in built.layers.layers).most_common()
        ),
        "seconds": made.seconds,
        "processor_seconds": round(spent, 1),
    }


def measure(name: str, size: tuple[int, int], targets: Sequence[tuple[int, ...]]) -> dict[str, Any]:
    """Every build of one detector."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for bundle in bundles(name, size, Path(scratch)):
            count = attentions(bundle)
            for some in targets:
                rows.append(build(bundle, some, count))
                print(name, json.dumps(rows[-1]), flush=True)
    return {
        "command": f"python -m tools.trt_builds {name} --size {size[0]}x{size[1]}",
        "tensorrt_rtx": load(RTX).__version__,
        "machine": platform.machine(),
        "attentions": count,
        "builds": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("presets", nargs="+")
    parser.add_argument("--size", default="640x640", help="canvas")
    parser.add_argument("--out", type=Path, help="JSON to write into")
    options = parser.parse_args()
    told: dict[str, Any] = {}
    if options.out is not None and options.out.exists():
        told = json.loads(options.out.read_text())
    size = parse_size(options.size)
    for name in options.presets:
        told[f"{name} {size[0]}x{size[1]}"] = measure(name, size, TARGETS)
        if options.out is not None:
            write_atomic(options.out, json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
