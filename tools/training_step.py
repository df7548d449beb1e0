"""Times a training step of the demo models: our kernel against the ``grid_sample`` path, in turns.

python -m tools.training_step kitti:runs/demo/data:train
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

from detr import msda
from distill.distributed import join
from distill.recipe import find_recipe, load_recipe
from distill.training.loop import train_step
from distill.training.run_dir import RunDir
from distill.training.state import set_up

ROUNDS = 7


def main() -> None:
    for name in ("demo-teacher", "demo-student-narrow"):
        recipe = load_recipe(find_recipe(name), (f"data.train={sys.argv[1]}", "data.val=null"))
        with tempfile.TemporaryDirectory() as scratch:
            state = set_up(recipe, RunDir(Path(scratch) / "run", recipe, True), join())
            batches = [state.batches.batch(i) for i in range(4)]
            seconds: dict[bool, list[float]] = {True: [], False: []}
            for index in range(ROUNDS):
                for kernel, times in seconds.items():
                    with mock.patch.object(msda, "native_available", lambda k=kernel: k):
                        begin = time.perf_counter()
                        train_step(state, batches[index % 4], index)
                        times.append(time.perf_counter() - begin)
        ours, theirs = (statistics.median(seconds[k][1:]) for k in (True, False))
        print(
            f"{name}: {ours * 1e3:.0f} ms with the kernel, {theirs * 1e3:.0f} ms with grid_sample, "
            f"{theirs / ours:.2f} x"
        )


if __name__ == "__main__":
    main()
