"""How many processor cores there are to use, and how threads wait on them."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_SELF = Path("/proc/self/cgroup")


def usable_cores() -> int:
    """Cores this process may run on: a container or ``taskset`` may allow fewer than there are."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    quota = cpu_quota()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def default_threads() -> int | None:
    """Threads for an engine that was told no number.

    Returns:
        ``OMP_NUM_THREADS``, else the cores a container's quota allows where those are fewer than it
        sees, else ``None``: the runtime knows the machine's cores best.
    """
    # A list is for nested parallelism, of which there is none here.
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if first.isdecimal() and int(first) > 0:
        return int(first)
    quota = cpu_quota()
    return None if quota is None else usable_cores()


def use_threads(number: int) -> None:
    """Sets the threads of everything in this process that is told no number of its own.

    Args:
        number: Of torch, of our kernel and of every engine opened from now on.
    """
    os.environ["OMP_NUM_THREADS"] = str(number)
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(number)


@cache  # asked before every call of the attention kernel
def cpu_quota(mount: Path = _CGROUPS, membership: Path = _SELF) -> float | None:
    """Cores that control groups allow this process, ``None`` without a limit.

    The scheduler lets a container see every core and stops its threads when their common time is
    up; as many threads as cores then wait for each other.

    Args:
        mount: Where control groups are mounted.
        membership: File with the groups of the process, ``ID:CONTROLLERS:PATH`` a line.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None
    limits: list[float] = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            limits += _limits(mount, path, _quota_v2)
        elif "cpu" in controllers.split(","):
            for name in (controllers, "cpu"):
                limits += _limits(mount / name, path, _quota_v1)
    return min(limits, default=None)


def _limits(root: Path, path: str, quota: Callable[[Path], float | None]) -> list[float]:
    """Limits of a group and of all above it; within a container its own group is the root."""
    group = root / path.lstrip("/")
    folders = [group, *group.parents]
    folders = folders[: folders.index(root) + 1] if root in folders else []
    found = [quota(folder) for folder in {root, *folders}]
    return [limit for limit in found if limit is not None]


def _quota_v2(folder: Path) -> float | None:
    """``cpu.max``: ``QUOTA PERIOD`` in microseconds, or ``max PERIOD``."""
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _quota_v1(folder: Path) -> float | None:
    """``cpu.cfs_quota_us`` over ``cpu.cfs_period_us``; -1 is no limit."""
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        return quota / int((folder / "cpu.cfs_period_us").read_text()) if quota > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


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
