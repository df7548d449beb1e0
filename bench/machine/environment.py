"""The machine a number was measured on, and whether its clocks stood still meanwhile.

A latency without its machine cannot be repeated, and one measured on a throttling machine is not
worth repeating. Clocks are read before, meanwhile and after; what cannot be read (a container, a
virtual machine) is called unreadable, and an unreadable clock never certifies a clean run.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from bench.machine.accelerator import Accelerator
from bench.machine.clocks import ClockRange, Clocks, CpuTime, Drift
from bench.machine.sysfs import Unreadable, read_text
from detr.cores import usable_cores

# A frequency this far below the start is throttling or power saving, not jitter.
_FREQUENCY_DROP = 0.10
# Shares of all cores' time, while timing, that other processes or the hypervisor may take.
_OTHERS_SHARE = 0.10
_STOLEN_SHARE = 0.02


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
        drift: Clocks between the timed calls.
        run: ``clean`` (clocks readable and steady, machine idle), ``disturbed`` (something was
            seen) or ``not certified`` (nothing was seen, but not everything could be read).
        reasons: Why the run is not clean.
    """

    machine: Machine
    before: Clocks
    after: Clocks
    drift: Drift | None = None
    run: Literal["clean", "disturbed", "not certified"]
    reasons: list[str]


def read_machine(engine_versions: Mapping[str, str] | None = None) -> Machine:
    """Describes this machine; ``engine_versions`` are added to the packages."""
    packages = {}
    for name in ("detr-distillery", "numpy", "onnxruntime", "faster-coco-eval", "pillow"):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = "not installed"
    return Machine(
        cpu=_cpu_name(),
        cores=os.cpu_count() or 1,
        cores_usable=usable_cores(),
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


def assess_environment(
    machine: Machine,
    before: Clocks,
    after: Clocks,
    drift: Drift | None = None,
    on_accelerator: bool = False,
) -> Environment:
    """Puts the readings together and says whether the run was undisturbed.

    Args:
        machine: Hardware and software.
        before: Clocks ahead of the measurement.
        after: Clocks at its end.
        drift: Clocks between the timed calls; without it only the two readings are compared.
        on_accelerator: Whether what was timed runs on the GPU. If so, a GPU that cannot be asked
            leaves the run uncertified; if not, its clocks are nobody's concern.
    """
    findings = _Findings()
    _assess_frequency(findings, before, after, drift)
    _assess_throttling(findings, before, after)
    if "unreadable" in (before.governor, after.governor):
        findings.unreadable.append("frequency governor unreadable")
    elif "powersave" in after.governor:
        findings.disturbances.append("frequency governor is powersave")
    if before.cpu_time == "unreadable" or after.cpu_time == "unreadable":
        findings.unreadable.append("processor time of other processes unreadable")
    else:
        findings.disturbances += _disturbances(before.cpu_time, after.cpu_time)
    if on_accelerator or (after.accelerator is not None and after.accelerator.integrated):
        _assess_accelerator(findings, before.accelerator, after.accelerator, drift, on_accelerator)
    run: Literal["clean", "disturbed", "not certified"] = "clean"
    if findings.disturbances or findings.unreadable:
        run = "disturbed" if findings.disturbances else "not certified"
    return Environment(
        machine=machine, before=before, after=after, drift=drift, run=run,
        reasons=findings.disturbances + findings.unreadable,
    )  # fmt: skip


@dataclass
class _Findings:
    """What was seen to disturb a run, and what nobody could know."""

    disturbances: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)


def _assess_frequency(
    findings: _Findings, before: Clocks, after: Clocks, drift: Drift | None
) -> None:
    if before.frequency_mhz == "unreadable" or after.frequency_mhz == "unreadable":
        findings.unreadable.append("core frequencies unreadable")
        return
    start, end = (sum(f) / len(f) for f in (before.frequency_mhz, after.frequency_mhz))
    if end < (1 - _FREQUENCY_DROP) * start:
        findings.disturbances.append(f"mean core frequency fell from {start:.0f} to {end:.0f} MHz")
    elif drift is not None and drift.cpu_mhz == "unreadable":
        findings.unreadable.append("core frequencies unreadable while timing")
    elif drift is not None and drift.cpu_mhz != "unreadable":
        _assess_span(findings, "mean core frequency", drift.cpu_mhz)


def _assess_throttling(findings: _Findings, before: Clocks, after: Clocks) -> None:
    # A Jetson has no counter per core; the chip's own, judged with the GPU, speak for them.
    if after.accelerator is not None and after.accelerator.integrated:
        return
    if before.throttle_count == "unreadable" or after.throttle_count == "unreadable":
        findings.unreadable.append("throttling counter unreadable")
    elif after.throttle_count > before.throttle_count:
        events = after.throttle_count - before.throttle_count
        findings.disturbances.append(f"{events} thermal throttling events")


def _assess_accelerator(
    findings: _Findings,
    before: Accelerator | None,
    after: Accelerator | None,
    drift: Drift | None,
    computing: bool,
) -> None:
    """Clocks count only where the GPU was ``computing``; throttling of one chip always does."""
    if before is None or after is None:
        findings.unreadable.append("GPU clocks unreadable (no NVML and no Jetson: nvidia-ml-py?)")
        return
    if computing:
        if drift is None or drift.gpu_mhz == "unreadable":
            findings.unreadable.append("GPU clock unreadable")
        else:
            _assess_span(findings, "GPU clock", drift.gpu_mhz)
        if after.power_mode == "unreadable":
            findings.unreadable.append("power mode unreadable")
    reasons = after.throttling if drift is None else drift.throttling
    if reasons == "unreadable":
        findings.unreadable.append("GPU throttling unreadable")
    else:
        findings.disturbances += [f"throttled: {reason}" for reason in reasons]
    if before.power_mode != after.power_mode:
        findings.disturbances.append(
            f"power mode went from {before.power_mode} to {after.power_mode}"
        )
    if before.throttle_events == "unreadable" or after.throttle_events == "unreadable":
        findings.unreadable.append("throttling counters of the GPU unreadable")
        return
    for name, count in after.throttle_events.items():
        events = count - before.throttle_events.get(name, 0)
        if events > 0:
            findings.disturbances.append(f"throttled: {events} × {name}")


def _assess_span(findings: _Findings, what: str, span: ClockRange) -> None:
    if span.low < (1 - _FREQUENCY_DROP) * span.high:
        findings.disturbances.append(
            f"{what} moved between {span.low:.0f} and {span.high:.0f} MHz while timing "
            f"({span.first:.0f} at first, {span.last:.0f} at last)"
        )


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


def _cpu_name() -> str:
    for line in (read_text(Path("/proc/cpuinfo")) or "").splitlines():
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
    for line in (read_text(Path("/etc/os-release")) or "").splitlines():
        if line.startswith("PRETTY_NAME="):
            name = line.partition("=")[2].strip('"')
            return f"{name}, {platform.system()} {platform.release()} {platform.machine()}"
    return platform.platform()
