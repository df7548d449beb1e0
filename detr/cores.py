"""How many processor cores there are to use."""

from __future__ import annotations

import os
import sys


def usable_cores() -> int:
    """Cores this process may run on: a container or ``taskset`` may allow fewer than there are."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
