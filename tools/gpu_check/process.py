"""A part in a process of its own, which leaves nothing behind on the GPU."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tools.gpu_check.part import Setting, last_line

ROOT = Path(__file__).resolve().parents[2]


def ended(command: list[str], seconds: float, out: Any, err: Any) -> int | None:
    """Runs a command; its exit status, ``None`` where it was not done in time.

    Whatever it started is ended with it: a compiler or profiler that lives on would keep the GPU's
    memory and slow the parts that follow.
    """
    process = subprocess.Popen(command, stdout=out, stderr=err, cwd=ROOT, start_new_session=True)
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        # Also after it ended by itself: what it left running is in its group still.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_part(stage: str, part: str, setting: Setting, seconds: float) -> dict[str, Any]:
    """One part: status, seconds, its cases, and result or reason."""
    start = time.perf_counter()
    options = ["--part", stage, part, "--device", setting.device]
    options += [str(path.resolve()) for path in setting.bundles]
    entry: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "tools.gpu_check", *options]),
    }
    # Files and not pipes: who still holds a pipe's end would be waited for.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        command = [sys.executable, "-m", "tools.gpu_check", *options]
        status = ended(command, seconds, out, err)
        out.seek(0)
        err.seek(0)
        cases, told = _read(out.read())
        said = last_line(err.read())
    if cases:
        entry["cases"] = cases
    if status is None:
        entry |= {"status": "failed", "reason": f"not done after {seconds:.0f} s"}
    elif status != 0:  # negative: ended by that signal
        entry |= {"status": "failed", "reason": said or "no word", "exit_status": status}
    elif told is None:
        entry |= {"status": "failed", "reason": f"told no result: {said}"}
    else:
        entry |= told
    return entry | {"seconds": round(time.perf_counter() - start, 1)}


def _read(text: str) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """The cases a part told, and its answer; libraries may have printed in between."""
    cases, answer = [], None
    for line in text.splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and "case" in found:
            cases.append(found)
        elif isinstance(found, dict) and "status" in found:
            answer = found
    return cases, answer
