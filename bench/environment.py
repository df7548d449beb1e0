"""The machine a number was measured on, and whether its clocks stood still meanwhile.

A latency without its machine cannot be repeated, and one measured on a throttling machine is not
worth repeating. Clocks are read before and after; what cannot be read (a container, a virtual
machine) is called unreadable, and an unreadable clock never certifies a clean run.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

CPU_ROOT = Path("/sys/devices/system/cpu")
STAT = Path("/proc/stat")

# A frequency this far below the start is throttling or power saving, not jitter.
_FREQUENCY_DROP = 0.10
# Shares of all cores' time, while timing, that other processes or the hypervisor may take.
_OTHERS_SHARE = 0.10
_STOLEN_SHARE = 0.02

Unreadable = Literal["unreadable"]


class CpuTime(BaseModel):
    """Seconds of processor time since boot, all cores together.

    Attributes:
        total: Everything, idle time included.
        busy: Spent running something.
        stolen: Withheld by the hypervisor.
        own: Of ``busy``, this process's.
    """

    total: float
    busy: float
    stolen: float
    own: float


class Clocks(BaseModel):
    """One reading of the processor's clocks.

    Attributes:
        governor: Frequency policies in use, comma-separated where the cores differ.
        frequency_mhz: Current frequency of each core.
        throttle_count: Thermal throttling events since boot, all cores together.
        cpu_time: Who used the processor.
    """

    governor: str = "unreadable"
    frequency_mhz: list[float] | Unreadable = "unreadable"
    throttle_count: int | Unreadable = "unreadable"
    cpu_time: CpuTime | Unreadable = "unreadable"


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
        before, after: Clocks.
        run: ``clean`` (clocks readable and steady, machine idle), ``disturbed`` (something was
            seen) or ``not certified`` (nothing was seen, but not everything could be read).
        reasons: Why the run is not clean.
    """

    machine: Machine
    before: Clocks
    after: Clocks
    run: Literal["clean", "disturbed", "not certified"]
    reasons: list[str]


def read_clocks(root: Path = CPU_ROOT, stat: Path = STAT) -> Clocks:
    """Reads governors, frequencies and throttling counts from Linux's sysfs and procfs."""
    cores = sorted(root.glob("cpu[0-9]*"), key=lambda core: int(core.name[3:]))
    governors = [_text(core / "cpufreq/scaling_governor") for core in cores]
    frequencies = [_number(core / "cpufreq/scaling_cur_freq") for core in cores]
    throttles = [_number(core / "thermal_throttle/core_throttle_count") for core in cores]
    clocks = Clocks(cpu_time=_cpu_time(stat))
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


def judge(machine: Machine, before: Clocks, after: Clocks) -> Environment:
    """Puts the readings together and says whether the run was undisturbed."""
    seen, unknown = [], []
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
    if before.cpu_time == "unreadable" or after.cpu_time == "unreadable":
        unknown.append("processor time of other processes unreadable")
    else:
        seen += _disturbances(before.cpu_time, after.cpu_time)
    run: Literal["clean", "disturbed", "not certified"] = "clean"
    if seen or unknown:
        run = "disturbed" if seen else "not certified"
    return Environment(machine=machine, before=before, after=after, run=run, reasons=seen + unknown)


def _disturbances(before: CpuTime, after: CpuTime) -> list[str]:
    total = max(after.total - before.total, 1e-9)
    own = after.own - before.own
    others = (after.busy - before.busy - own) / total
    stolen = (after.stolen - before.stolen) / total
    seen = []
    if others > _OTHERS_SHARE:
        seen.append(f"other processes took {100 * others:.0f} % of the processor time")
    if stolen > _STOLEN_SHARE:
        seen.append(f"the hypervisor withheld {100 * stolen:.0f} % of the processor time")
    return seen


def _cpu_time(stat: Path) -> CpuTime | Unreadable:
    """Fields of ``/proc/stat`` (proc(5)), in ticks: user nice system idle iowait irq softirq steal.

    The virtual machines' time in the fields after them is already part of user and nice.
    """
    fields = (_text(stat) or "").split("\n", 1)[0].split()
    if len(fields) < 9 or fields[0] != "cpu" or not all(f.isdigit() for f in fields[1:9]):
        return "unreadable"
    user, nice, system, idle, iowait, irq, softirq, steal = (int(f) for f in fields[1:9])
    busy = user + nice + system + irq + softirq
    tick = os.sysconf("SC_CLK_TCK")
    return CpuTime(
        total=(busy + idle + iowait + steal) / tick,
        busy=busy / tick,
        stolen=steal / tick,
        own=time.process_time(),
    )


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
