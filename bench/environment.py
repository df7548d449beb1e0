"""The machine a number was measured on, and whether its clocks stood still meanwhile.

A latency without its machine cannot be repeated, and one measured on a throttling machine is not
worth repeating. Clocks are read before and after; what cannot be read (a container, a virtual
machine) is called unreadable, and an unreadable clock never certifies a clean run.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

CPU_ROOT = Path("/sys/devices/system/cpu")

# A frequency this far below the start is throttling or power saving, not jitter.
_FREQUENCY_DROP = 0.10
# Work of others per usable core, from the load average before the first measurement.
_BUSY_LOAD = 0.25

Unreadable = Literal["unreadable"]


class Clocks(BaseModel):
    """One reading of the processor's clocks.

    Attributes:
        governor: Frequency policies in use, comma-separated where the cores differ.
        frequency_mhz: Current frequency of each core.
        throttle_count: Thermal throttling events since boot, all cores together.
    """

    governor: str = "unreadable"
    frequency_mhz: list[float] | Unreadable = "unreadable"
    throttle_count: int | Unreadable = "unreadable"


class Machine(BaseModel):
    """Hardware and software.

    Attributes:
        cpu: Model name.
        cores: Logical cores of the machine.
        cores_usable: Of those, the ones this process may run on.
        memory_gb: Main memory, GiB.
        os: Kernel and distribution.
        python: Version.
        packages: Version of each package the result depends on.
        thread_settings: Environment variables that set thread counts.
    """

    cpu: str
    cores: int
    cores_usable: int
    memory_gb: float | Unreadable
    os: str
    python: str
    packages: dict[str, str]
    thread_settings: dict[str, str]


class Environment(BaseModel):
    """The machine, its clocks around the measurement, and the verdict on them.

    Attributes:
        machine: Hardware and software.
        load_before: One-minute load average before the first measurement.
        before, after: Clocks.
        run: ``clean`` (clocks readable and steady, machine idle), ``disturbed`` (something was
            seen) or ``not certified`` (nothing was seen, but not everything could be read).
        reasons: Why the run is not clean.
    """

    machine: Machine
    load_before: float | Unreadable
    before: Clocks
    after: Clocks
    run: Literal["clean", "disturbed", "not certified"]
    reasons: list[str]


def read_clocks(root: Path = CPU_ROOT) -> Clocks:
    """Reads governors, frequencies and throttling counts from Linux's sysfs under ``root``."""
    cores = sorted(root.glob("cpu[0-9]*"), key=lambda core: int(core.name[3:]))
    governors = [_text(core / "cpufreq/scaling_governor") for core in cores]
    frequencies = [_number(core / "cpufreq/scaling_cur_freq") for core in cores]
    throttles = [_number(core / "thermal_throttle/core_throttle_count") for core in cores]
    clocks = Clocks()
    # One silent core is enough: it may be the one that was slowed down.
    if cores and all(governors):
        clocks.governor = ",".join(sorted({g for g in governors if g}))
    if cores and None not in frequencies:
        clocks.frequency_mhz = [f / 1000 for f in frequencies if f is not None]
    if cores and None not in throttles:
        clocks.throttle_count = sum(t for t in throttles if t is not None)
    return clocks


def read_machine(engine_versions: Mapping[str, str] | None = None) -> Machine:
    """Describes this machine; ``engine_versions`` are added to the packages."""
    packages = {}
    for name in ("detr-distillery", "numpy", "onnxruntime", "faster-coco-eval", "pillow"):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = "not installed"
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Machine(
        cpu=_cpu_name(),
        cores=os.cpu_count() or 1,
        cores_usable=usable or 1,
        memory_gb=_memory_gb(),
        os=_os_name(),
        python=platform.python_version(),
        packages={**packages, **(engine_versions or {})},
        thread_settings={
            key: value
            for key, value in sorted(os.environ.items())
            if key.endswith("_NUM_THREADS") or key == "THP_MEM_ALLOC_ENABLE"
        },
    )


def read_load() -> float | Unreadable:
    """The one-minute load average."""
    try:
        return round(os.getloadavg()[0], 2)
    except (OSError, AttributeError):
        return "unreadable"


def judge(
    machine: Machine, load_before: float | Unreadable, before: Clocks, after: Clocks
) -> Environment:
    """Puts the readings together and says whether the run was undisturbed."""
    seen, unknown = [], []
    if load_before == "unreadable":
        unknown.append("load average unreadable")
    elif load_before > _BUSY_LOAD * machine.cores_usable:
        seen.append(
            f"load average {load_before} before the first measurement on {machine.cores_usable} "
            "usable cores: other work was running"
        )
    if before.frequency_mhz == "unreadable" or after.frequency_mhz == "unreadable":
        unknown.append("core frequencies unreadable")
    else:
        start, end = (sum(f) / len(f) for f in (before.frequency_mhz, after.frequency_mhz))
        if end < (1 - _FREQUENCY_DROP) * start:
            seen.append(f"mean core frequency fell from {start:.0f} to {end:.0f} MHz")
    if before.throttle_count == "unreadable" or after.throttle_count == "unreadable":
        unknown.append("throttling counter unreadable")
    elif after.throttle_count > before.throttle_count:
        seen.append(f"{after.throttle_count - before.throttle_count} thermal throttling events")
    if "unreadable" in (before.governor, after.governor):
        unknown.append("frequency governor unreadable")
    elif "powersave" in after.governor:
        seen.append("frequency governor is powersave")
    run: Literal["clean", "disturbed", "not certified"] = "clean"
    if seen or unknown:
        run = "disturbed" if seen else "not certified"
    return Environment(
        machine=machine, load_before=load_before, before=before, after=after, run=run,
        reasons=seen + unknown,
    )  # fmt: skip


def _cpu_name() -> str:
    for line in (_text(Path("/proc/cpuinfo")) or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model"):
            return value.strip()
    return platform.processor() or platform.machine()


def _memory_gb() -> float | Unreadable:
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return "unreadable"
    return round(size / 2**30, 1)


def _os_name() -> str:
    for line in (_text(Path("/etc/os-release")) or "").splitlines():
        if line.startswith("PRETTY_NAME="):
            name = line.partition("=")[2].strip('"')
            return f"{name}, {platform.system()} {platform.release()} {platform.machine()}"
    return platform.platform()


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip() or None
    except OSError:
        return None


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text is not None and text.isdigit() else None
