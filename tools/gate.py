"""Prints the fault table of docs/gate.md: every seeded fault, and what the gate says of it.

    python -m tools.gate [--scenes 24] [--bundle KEPT]

Behind each figure stands how many times its budget it is. Healthy engines come first.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from pathlib import Path

from detr import msda
from detr.shipped import find_model
from engines import Engine, open_bundle, open_engine
from engines.torch_engine import TorchEngine
from engines.verdict import EngineVerdict
from export.bundle import export_bundle
from export.parity.budget import default_budget
from export.parity.engines import engine_verdicts
from tools import gate_faults

_BUDGET = default_budget("fp32")


def row(name: str, verdict: EngineVerdict) -> str:
    parity = verdict.parity
    cells = [name]
    if parity is None:
        cells += ["–"] * 6
    else:
        counted = parity.missing + parity.extra + parity.class_flips + parity.not_finite
        cells.append(str(counted))
        for value, budget in (
            (parity.max_box_px, _BUDGET.box_px),
            (parity.median_box_px, _BUDGET.box_px_median),
            (parity.max_score, _BUDGET.score),
            (parity.median_score, _BUDGET.score_median),
        ):
            # Nothing matched, nothing to measure.
            cells.append(f"{value:.2g} ({value / budget:.2g})" if parity.matched else "–")
        gap = None
        if verdict.ap is not None and verdict.reference_ap is not None:
            gap = verdict.ap - verdict.reference_ap
        cells.append("–" if gap is None else f"{100 * gap:+.2f} ({abs(gap) / _BUDGET.ap:.2g})")
    deviation = "" if verdict.deviation is None else verdict.deviation.layer
    cells += [verdict.status, deviation, "" if verdict.pitfall is None else verdict.pitfall.id]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--scenes", type=int, default=24)
    parser.add_argument("--bundle", type=Path)
    arguments = parser.parse_args()
    teacher = find_model(Path("demo-teacher"))
    reference = TorchEngine(teacher)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kept = arguments.bundle or folder / "demo.bundle"
        if not kept.exists():
            export_bundle(teacher, kept, batch="dynamic")
        bundle = open_bundle(kept)
        samples = gate_faults.scenes(folder / "scenes", arguments.scenes, reference)
        print(
            "| | lost, new, other class | box px | median | score | median | AP | verdict "
            "| begins in | told as |"
        )
        print("|---|---|---|---|---|---|---|---|---|---|")
        engines: list[Engine] = [open_engine(kept, "onnxruntime")]
        engines += [open_engine(kept, "native")] if msda.native_available() else []
        if importlib.util.find_spec("openvino"):
            engines.append(open_engine(kept, "openvino"))
        for verdict in engine_verdicts(bundle, reference, engines, samples, _BUDGET):
            print(row(f"healthy, {verdict.engine}", verdict), flush=True)
        for title, fault in gate_faults.FAULTS.items():
            place = folder / title.replace(" ", "-") / "x.bundle"
            verdict = gate_faults.faulty_verdict(fault, bundle, place, reference, samples)
            print(row(title, verdict), flush=True)


if __name__ == "__main__":
    main()
