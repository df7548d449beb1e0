"""What training and exporting compute, as hashes: a change that should change nothing shows here.

python -m tools.fingerprint --out before.json
python -m tools.fingerprint --out after.json --against before.json
python -m tools.fingerprint --report runs/demo/report.json --against docs/measured/demo-6454fb6.json

Trains every family's detector and every method's student for ten steps, on a few drawn scenes and
one thread, and hashes the weights; exports the demo teacher in every precision and hashes the
graph. Same machine, same libraries, same instruction set: equal hashes. With ``--report`` it takes
the COCO and KITTI AP of each row of a report of ``bench run`` instead. The exit status is 1 where
something differs from the file named by ``--against``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from click.testing import CliRunner
from safetensors.numpy import load_file

from bench.report.model import Report
from detr.cli import main as detr
from detr.data.synth import generate
from detr.upgrade import composed
from distill.methods import METHODS
from distill.recipe import Recipe
from distill.training.loop import train

# One small detector of each family, written down in the form of the first version: if they followed
# the presets, a preset's change would look like a change of what is computed.
DETECTORS = Path(__file__).with_name("fingerprint_detectors.json")
SIZE = (64, 128)
# The methods' students and teachers: DINO, but Stable-DINO's and OD-DETR's need no teacher.
ARCHITECTURE = "dino"


def digest(folder: Path) -> str:
    """Hash of a run's weights, by name, type, shape and value."""
    sha = hashlib.sha256()
    for name, x in sorted(load_file(folder / "model.safetensors").items()):
        sha.update(f"{name} {x.dtype} {x.shape}".encode())
        sha.update(x.tobytes())
    return sha.hexdigest()


def trained(folder: Path, scenes: Path, name: str, detector: dict[str, Any], **more: Any) -> Path:
    """The run of ten steps of a detector."""
    recipe = {
        "name": name,
        "data": {"train": f"coco:{scenes}:train"},
        "input": {"size": SIZE},
        "detector": detector,
        "steps": 10,
        "batch_size": 2,
        "optimizer": {"lr": 1e-3, "backbone_lr": 1e-3, "clip": 1.0},
        "augment": {"zoom": [0.8, 1.4]},
        **more,
    }
    train(Recipe.model_validate(recipe), folder / name)
    return folder / name


def exported(folder: Path, precision: str, scenes: Path) -> str:
    """Hash of the demo teacher's graph in one precision."""
    out = folder / f"{precision}.bundle"
    command = ["export", "onnx", "demo-teacher", "--out", str(out), "--precision", precision]
    if precision == "int8":
        command += ["--calibration", f"coco:{scenes}:train"]
    done = CliRunner().invoke(detr, command)
    found = out if out.is_dir() else out.with_name(f"{precision}.rejected.bundle")
    if not found.is_dir():
        raise SystemExit(f"{' '.join(command)}: {done.output}")
    sha = hashlib.sha256()
    for name in ("model.onnx", "model.onnx.data"):
        if (found / name).is_file():
            sha.update((found / name).read_bytes())
    return sha.hexdigest()


def fingerprints(folder: Path) -> dict[str, str]:
    """Every hash by what it is of."""
    scenes, result = folder / "scenes", {}
    generate(scenes, images=10, size=SIZE, seed=3, format="coco")
    # Written by an earlier release, as the hashes they are compared with.
    flat: dict[str, dict[str, Any]] = json.loads(DETECTORS.read_text())
    detectors = {family: composed(detector) for family, detector in flat.items()}
    for family, detector in detectors.items():
        detector = {**detector, "num_classes": 0}
        result[f"family {family}"] = digest(trained(folder, scenes, family, detector))
        print(f"family {family}: {result[f'family {family}']}", flush=True)
    teacher = str(folder / ARCHITECTURE)
    for name in METHODS:
        # Which need a detector with distributions, or weights that nobody brings.
        if name.startswith(("go_lsd", "foundation")):
            continue
        detector = {**detectors[ARCHITECTURE], "num_classes": 0}
        more: dict[str, Any] = {"methods": [name], "seed": 1, "ema": 0.9}
        if METHODS[name].teacher == "frozen":
            more |= {"teacher": teacher, "inherit": True}
        result[f"method {name}"] = digest(trained(folder, scenes, f"m-{name}", detector, **more))
        print(f"method {name}: {result[f'method {name}']}", flush=True)
    for precision in ("fp32", "fp16", "int8"):
        result[f"export {precision}"] = exported(folder, precision, scenes)
        print(f"export {precision}: {result[f'export {precision}']}", flush=True)
    return result


def accuracies(report: Path) -> dict[str, Any]:
    """COCO and KITTI AP of every row of a report by the row's name."""
    rows = Report.model_validate_json(report.read_text()).rows
    return {row.name: row.model_dump(mode="json", include={"coco", "kitti"}) for row in rows}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="JSON file for the hashes")
    parser.add_argument("--report", type=Path, help="report.json to take AP from, nothing trained")
    parser.add_argument("--against", type=Path, help="JSON file of an earlier state")
    options = parser.parse_args()
    result: dict[str, Any]
    if options.report is not None:
        result = accuracies(options.report)
    else:
        with tempfile.TemporaryDirectory() as folder:
            result = dict(fingerprints(Path(folder)))
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    if options.against is not None:
        before = json.loads(options.against.read_text())
        changed = [name for name in before if result.get(name) != before[name]]
        print(f"{len(before) - len(changed)} of {len(before)} equal", *changed, sep="\n  ")
        raise SystemExit(bool(changed))


if __name__ == "__main__":
    main()
