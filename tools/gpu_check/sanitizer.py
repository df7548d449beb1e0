"""compute-sanitizer over both kernels, where a toolkit brings it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from functools import partial
from typing import Any

from tools.gpu_check.part import Parts, Setting, Skipped, last_line
from tools.gpu_check.process import ROOT
from tools.gpu_check.sanitized import KINDS

_FOUND = 9  # exit status of a run in which it found something
# Accesses are another matter of each kind of code; races and barriers are of the same few lines.
_RUNS = {"memcheck": tuple(KINDS)} | {
    tool: ("float32-32-fixed",) for tool in ("racecheck", "synccheck", "initcheck")
}


def sanitizer(setting: Setting) -> Parts:
    """Each tool over the kinds of code it is for."""
    return {
        f"{tool} {kind}": partial(sanitize, setting, tool, kind)
        for tool, kinds in _RUNS.items()
        for kind in kinds
    }


def sanitize(setting: Setting, tool: str, kind: str) -> dict[str, Any]:
    """One tool over one kind."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        raise Skipped("no compute-sanitizer on the path")
    if setting.device == "cpu":
        raise Skipped("needs a driver")
    command = [program, "--tool", tool, "--error-exitcode", str(_FOUND), sys.executable]
    command += ["-m", "tools.gpu_check.sanitized", kind]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    said = done.stdout + done.stderr
    if "Device not supported" in said:  # by the sanitizer, of some virtual machines
        raise Skipped("compute-sanitizer: device not supported")
    if done.returncode == _FOUND:
        errors = [line for line in said.splitlines() if line.startswith("=========")]
        raise RuntimeError("; ".join(line.strip("= ") for line in errors[1:4]))
    if done.returncode != 0 or "ERROR SUMMARY: 0 errors" not in said:
        raise RuntimeError(f"exit status {done.returncode}: {last_line(said)}")
    return {"errors": 0}
