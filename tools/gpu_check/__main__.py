"""The command line: runs the plan, part by part, and writes what is known after each."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from detr.cli_support import progress
from detr.errors import UserError
from detr.files import write_atomic
from engines.trt.cuda import compute_capability, no_device
from tools.gpu_check.artifacts import EXPORTED
from tools.gpu_check.machine import machine
from tools.gpu_check.part import Setting, answer
from tools.gpu_check.plan import STAGES, planned
from tools.gpu_check.process import ROOT, run_part

OUT = ROOT / "docs" / "measured"


def check(names: list[str], setting: Setting, out: Path, seconds: float) -> int:
    """Runs all parts one after the other.

    Args:
        names: Stages.
        setting: Device and bundles; the shipped detector is exported where there are none.
        out: Folder of the report. One of the same day is not overwritten.
        seconds: For all of it; what has not begun by then is told as skipped.

    Returns:
        The exit status: 1 where something failed.
    """
    end = time.monotonic() + seconds
    now = datetime.now(timezone.utc)
    prefix = "gpu" if setting.device == "cuda" else "cpu"
    path = out / f"{prefix}-{now:%Y-%m-%d}.json"
    if path.exists():
        path = out / f"{prefix}-{now:%Y-%m-%d-%H%M%S}.json"
    stages: dict[str, dict[str, Any]] = {}
    told: dict[str, Any] = {"date": now.isoformat(timespec="seconds"), "machine": machine()}
    with tempfile.TemporaryDirectory() as scratch:
        if setting.bundles:
            names = [name for name in names if name != "export"]
        else:
            made = tuple(Path(scratch) / f"demo-{precision}.bundle" for precision in EXPORTED)
            setting = Setting(setting.device, made)
        told |= {"bundles": [str(bundle) for bundle in setting.bundles], "stages": stages}
        for name, part, reason in progress(planned(names, setting), "gpu-check"):
            left = end - time.monotonic()
            if part is None:
                entry = {"status": "skipped", "reason": reason, "seconds": 0.0}
            elif left <= 0:
                entry = {"status": "skipped", "reason": "no time left", "seconds": 0.0}
            else:
                entry = run_part(name, part, setting, min(left, STAGES[name].seconds))
            stages.setdefault(name, {})[part or "all"] = entry
            write_atomic(path, json.dumps(told, indent=1) + "\n")
    failed = False
    for name, parts in stages.items():
        for part, entry in parts.items():
            failed |= entry["status"] == "failed"
            print(
                f"{name + ', ' + part:<44} {entry['status']:<8} {entry['seconds']:7.1f} s "
                f"{entry.get('reason', '')}"
            )
    print(f"wrote {path}")
    return int(failed)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 where nothing failed, 1 where something did, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_check")
    parser.add_argument("bundles", nargs="*", type=Path, help="the shipped detector's by default")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the report")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=24 * 3600.0, help="for all of it")
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    setting = Setting(options.device, tuple(options.bundles))
    if options.part is not None:
        stage, part = options.part
        print("\n" + json.dumps(answer(lambda: STAGES[stage].parts(setting)[part]())), flush=True)
        return 0
    try:
        if setting.device == "cuda" and compute_capability() is None:
            raise UserError("device-missing", f"gpu-check needs a CUDA device: {no_device()}")
        return check(options.only, setting, options.out, options.seconds)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_status


if __name__ == "__main__":
    sys.exit(main())
