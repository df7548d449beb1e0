"""Whether real-time detectors that know something pass the gate in half precision and in int8.

    python -m tools.trained_gate --out docs/measured/trained-gate.json

Random weights find nothing confidently, so that there is nothing to lose. Each family's small
detector learns four scenes by heart (:mod:`tools.overfit`), is exported in both precisions, and
every engine of this machine is judged on the four scenes under the precision's budget. One line per
engine; the exit status is 1 if one is rejected.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from detr.cli_support import progress
from detr.data import open_dataset
from detr.files import write_atomic
from engines import open_engine
from engines.bundle import Precision, open_bundle
from engines.torch_engine import TorchEngine
from export.bundle import write_bundle
from export.parity.budget import default_budget
from export.parity.compare import compare_detections
from export.precision.apply import PrecisionRequest
from export.trace.torch_to_onnx import export_graph
from tools.overfit import overfit

FAMILIES = ("rtdetr", "d-fine", "lwdetr", "rfdetr")
PRECISIONS: tuple[Precision, ...] = ("fp16", "int8")
# What rounds every value that is typed half, and the processor's fastest.
ENGINES = ("half", "onnxruntime", "openvino")


def judged(family: str, steps: int, folder: Path) -> Iterator[dict[str, Any]]:
    """One row per precision and engine.

    Args:
        family: One of the presets' families.
        steps: Of its training.
        folder: For scenes, run and bundles; new or empty.
    """
    overfit(family, steps, folder)
    torch = TorchEngine(folder / "run" / "model.safetensors")
    size = torch.info.preprocess.canvases[0]
    graph = export_graph(torch.detector, size, 17, 1, "gridsample")
    data = open_dataset(f"coco:{folder / 'scenes'}:train", torch.info.classes)
    scenes = [data.image(i) for i in range(len(data))]
    wanted = [torch([scene])[0] for scene in scenes]
    for precision in PRECISIONS:
        budget, out = default_budget(precision), folder / f"{precision}.bundle"
        request = PrecisionRequest(precision, calibration=scenes if precision == "int8" else ())
        with progress(range(3), f"export {out.name}", 3) as bar:
            write_bundle(graph, torch, out, 17, 1, "gridsample", scenes, request, False, bar)
        island = list(open_bundle(out).info.island)
        for name in ENGINES:
            engine = open_engine(out, name, threads=1)
            found = compare_detections(wanted, [engine([x])[0] for x in scenes], budget)
            yield {
                "family": family,
                "precision": precision,
                "engine": name,
                "versions": engine.versions,
                "detections": found.detections,
                "missing": found.missing,
                "extra": found.extra,
                "max_box_px": round(found.max_box_px, 4),
                "median_box_px": round(found.median_box_px, 4),
                "max_score": round(found.max_score, 5),
                "median_score": round(found.median_score, 5),
                "violations": found.violations(budget),
                "island": island,
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, help="JSON to write")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for family in options.families:
        with tempfile.TemporaryDirectory() as scratch:
            for row in judged(family, options.steps, Path(scratch)):
                rows.append(row)
                print(json.dumps({k: v for k, v in row.items() if k != "island"}), flush=True)
        if options.out is not None:
            told = {
                "command": f"python -m tools.trained_gate --steps {options.steps}",
                "rows": rows,
            }
            write_atomic(options.out, json.dumps(told, indent=1) + "\n")
    raise SystemExit(any(row["violations"] for row in rows))


if __name__ == "__main__":
    main()
