"""How many processor cores there are to use, and how threads wait on them."""

from __future__ import annotations

import os
import sys


def usable_cores() -> int:
    """Cores this process may run on: a container or ``taskset`` may allow fewer than there are."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# Whoever sets one of these has chosen how OpenMP's threads wait.
_CHOSEN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def let_threads_sleep() -> None:
    """Lets OpenMP's threads sleep, not spin, while they wait for each other.

    A spinning thread holds a core that the one it waits for may need: beside a single other busy
    process a training step takes several times as long (``docs/performance.md``). OpenMP asks once,
    when torch loads it; after that this does nothing, and neither does it where the user has
    chosen.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in _CHOSEN):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
