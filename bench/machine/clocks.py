"""What the machine's clocks do while something is timed: read, watched and summed up.

Clocks are read before, between the timed calls and after. An idle GPU lowers its clocks within
milliseconds, so what it did before and after a measurement says little about the measurement.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from pydantic import BaseModel

from bench.machine.accelerator import Accelerator, read_accelerator
from bench.machine.sysfs import Unreadable, read_number, read_text

CPU_ROOT = Path("/sys/devices/system/cpu")
STAT = Path("/proc/stat")
# Desktops and laptops with ACPI; a Jetson's mode is its accelerator's.
PROFILE = Path("/sys/firmware/acpi/platform_profile")

# Often enough to see a clock that drifts, seldom enough to leave caches alone.
_WATCH_INTERVAL = 0.25


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
    """One reading of the clocks.

    Attributes:
        governor: Frequency policies in use, comma-separated where the cores differ.
        frequency_mhz: Current frequency of each core.
        throttle_count: Thermal throttling events since boot, all cores together.
        cpu_time: Who used the processor.
        power_profile: ACPI platform profile, where the machine has one.
        accelerator: The GPU, where there is one.
    """

    governor: str = "unreadable"
    frequency_mhz: list[float] | Unreadable = "unreadable"
    throttle_count: int | Unreadable = "unreadable"
    cpu_time: CpuTime | Unreadable = "unreadable"
    power_profile: str | None = None
    accelerator: Accelerator | None = None


class ClockRange(BaseModel):
    """How one clock moved over a measurement, MHz.

    Attributes:
        low, median, high: Over all readings.
        first, last: The first and the last reading.
    """

    low: float
    median: float
    high: float
    first: float
    last: float


class Drift(BaseModel):
    """The readings between the timed calls, summed up.

    Attributes:
        readings: How many.
        cpu_mhz: Mean over the cores.
        gpu_mhz: Clock of the accelerator's compute units.
        throttling: What throttled the accelerator in any of the readings.
    """

    readings: int
    cpu_mhz: ClockRange | Unreadable
    gpu_mhz: ClockRange | Unreadable
    throttling: list[str] | Unreadable


class Watch:
    """Reads the clocks between timed calls, at most every quarter second.

    Args:
        read: Where a reading comes from.
        now: A clock in seconds.
    """

    def __init__(
        self,
        read: Callable[[], Clocks] | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read = read or read_clocks
        self._now = now
        self._next = float("-inf")
        self.readings: list[Clocks] = []

    def __call__(self) -> None:
        """Takes a reading if it is time for one; the first call always does."""
        if self._now() >= self._next:
            self.readings.append(self._read())
            self._next = self._now() + _WATCH_INTERVAL

    def drift(self) -> Drift:
        """Sums the readings up; one silent reading makes a clock unreadable."""
        gpus = [r.accelerator for r in self.readings]
        throttling = [g.throttling if g is not None else "unreadable" for g in gpus]
        return Drift(
            readings=len(self.readings),
            cpu_mhz=_span(
                [
                    "unreadable" if r.frequency_mhz == "unreadable"
                    else sum(r.frequency_mhz) / len(r.frequency_mhz)
                    for r in self.readings
                ]
            ),
            gpu_mhz=_span([g.clock_mhz if g is not None else "unreadable" for g in gpus]),
            throttling="unreadable" if "unreadable" in throttling or not throttling
            else list(dict.fromkeys(name for names in throttling for name in names)),
        )  # fmt: skip


def _span(values: Sequence[float | Unreadable]) -> ClockRange | Unreadable:
    known = [value for value in values if value != "unreadable"]
    if not known or len(known) < len(values):
        return "unreadable"
    return ClockRange(
        low=min(known), median=median(known), high=max(known), first=known[0], last=known[-1]
    )


def read_clocks(
    root: Path = CPU_ROOT,
    stat: Path = STAT,
    profile: Path = PROFILE,
    accelerator: Callable[[], Accelerator | None] = read_accelerator,
) -> Clocks:
    """Reads processor and accelerator from Linux's sysfs and procfs, and from NVML."""
    cores = sorted(root.glob("cpu[0-9]*"), key=lambda core: int(core.name[3:]))
    governors = [read_text(core / "cpufreq/scaling_governor") for core in cores]
    frequencies = [read_number(core / "cpufreq/scaling_cur_freq") for core in cores]
    throttles = [read_number(core / "thermal_throttle/core_throttle_count") for core in cores]
    clocks = Clocks(
        cpu_time=_cpu_time(stat), power_profile=read_text(profile), accelerator=accelerator()
    )
    # One silent core is enough: it may be the one that was slowed down.
    if cores and all(governors):
        clocks.governor = ",".join(sorted({g for g in governors if g}))
    if cores and None not in frequencies:
        clocks.frequency_mhz = [f / 1000 for f in frequencies if f is not None]
    if cores and None not in throttles:
        clocks.throttle_count = sum(t for t in throttles if t is not None)
    return clocks


def _cpu_time(stat: Path) -> CpuTime | Unreadable:
    """Fields of ``/proc/stat`` (proc(5)), in ticks: user nice system idle iowait irq softirq steal.

    The virtual machines' time in the fields after them is already part of user and nice.
    """
    fields = (read_text(stat) or "").split("\n", 1)[0].split()
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
