"""How much of end-to-end time is pre- and post-processing, on real images.

    python -m tools.pre_and_post BUNDLE IMAGE_FOLDER [ENGINE]

Wall time is what a user waits for; processor time is what the machine would need undisturbed, and
the figure to go by where other processes want the cores.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from pathlib import Path

from detr.data.images import SUFFIXES, read_image
from engines import open_engine

WARM_UP, ROUNDS, IMAGES = 1, 6, 8


def main() -> None:
    bundle, folder = Path(sys.argv[1]), Path(sys.argv[2])
    engine = open_engine(bundle, sys.argv[3] if len(sys.argv) > 3 else None)
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)[:IMAGES]
    images = [read_image(path) for path in paths]
    wall: list[list[float]] = []
    cpu: list[list[float]] = []
    for k in range(WARM_UP + ROUNDS):
        marks = [(time.perf_counter(), time.process_time())]
        inputs = engine.prepare([images[k % len(images)]])
        marks.append((time.perf_counter(), time.process_time()))
        raw = engine.run(inputs)
        marks.append((time.perf_counter(), time.process_time()))
        engine.finish(raw)
        marks.append((time.perf_counter(), time.process_time()))
        if k >= WARM_UP:
            for clock, parts in enumerate((wall, cpu)):
                parts.append([1e3 * (b[clock] - a[clock]) for a, b in itertools.pairwise(marks)])
    for name, parts in (("wall", wall), ("processor", cpu)):
        pre, run, post = (statistics.median(column) for column in zip(*parts, strict=True))
        share = (pre + post) / (pre + run + post)
        print(
            f"{engine.name}, {name} time, ms: prepare {pre:.2f}, run {run:.1f}, finish {post:.3f}; "
            f"pre- and post-processing {100 * share:.1f} % of end to end"
        )


if __name__ == "__main__":
    main()
