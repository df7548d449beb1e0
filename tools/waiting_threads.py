"""Times a training step by how OpenMP's threads wait, alone and beside one busy process, in turns.

python -m tools.waiting_threads kitti:runs/demo/data:train --rounds 9
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SETTINGS: dict[str, dict[str, str]] = {
    "as OpenMP does": {},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
}
_CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "MKL_NUM_THREADS")


def contender(data: str, threads: int, images: int) -> None:
    """A process that makes a step for every line it is sent, and answers in milliseconds."""
    import torch

    from distill.distributed import join
    from distill.recipe import find_recipe, load_recipe
    from distill.training.loop import train_step
    from distill.training.run_dir import RunDir
    from distill.training.state import set_up

    torch.set_num_threads(threads)
    changes = (f"data.train={data}", "data.val=null", f"batch_size={images}")
    recipe = load_recipe(find_recipe("demo-teacher"), changes)
    with tempfile.TemporaryDirectory() as scratch:
        state = set_up(recipe, RunDir(Path(scratch) / "run", recipe, True), join())
    batches = [state.batches.batch(i) for i in range(2)]
    for index, _ in enumerate(sys.stdin):
        begin = time.perf_counter()
        train_step(state, batches[index % 2], index)
        print((time.perf_counter() - begin) * 1e3, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--images", type=int, default=8, help="of a step")
    parser.add_argument("--contender", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.contender:
        contender(given.data, given.threads, given.images)
        return
    plain = {key: value for key, value in os.environ.items() if key not in _CHOICES}
    # With torch imported first, the project chooses nothing.
    code = "import torch; from tools.waiting_threads import main; main()"
    call = [sys.executable, "-c", code]
    call += [given.data, "--contender", "--threads", str(given.threads)]
    call += ["--images", str(given.images)]
    processes = {
        name: subprocess.Popen(
            call,
            env={**plain, "OMP_NUM_THREADS": str(given.threads), **setting},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name, setting in SETTINGS.items()
    }
    times: dict[str, dict[str, list[float]]] = {name: {} for name in SETTINGS}
    for turn in range(given.rounds + 1):  # the first one warms up
        for neighbor in ("alone", "beside one"):
            busy = None
            if neighbor != "alone":
                busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            for name, process in processes.items():
                assert process.stdin is not None and process.stdout is not None
                process.stdin.write("\n")
                process.stdin.flush()
                found = float(process.stdout.readline())
                if turn:
                    times[name].setdefault(neighbor, []).append(found)
            if busy is not None:
                busy.kill()
                busy.wait()
    for process in processes.values():
        process.communicate()
    rows = {
        name: {
            neighbor: {"median": round(statistics.median(ms)), "most": round(max(ms))}
            for neighbor, ms in found.items()
        }
        for name, found in times.items()
    }
    print(json.dumps({"load": os.getloadavg()[0], "ms": rows}, indent=2))


if __name__ == "__main__":
    main()
