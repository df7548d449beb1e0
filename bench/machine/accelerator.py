"""Clocks, power mode and throttling of the accelerator: NVML on a desktop, sysfs on a Jetson.

Both readers take where they read from as an argument, so that what they make of it is tested on
recorded readings. What cannot be read is called unreadable and never guessed.

Sources: NVML API reference (clocks event reasons); Jetson Linux Developer Guide, "Platform Power
and Performance", for nvpmodel, the ``soctherm_oc`` counters and the throttle-alert cooling devices.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from bench.machine.sysfs import Unreadable, read_number, read_text

# Bits of nvmlDeviceGetCurrentClocksEventReasons that mean "slower than asked for". Left out are
# idle (nothing runs) and clocks somebody set on purpose, which is how one benchmarks.
_NVML_THROTTLES = {
    0x0004: "software power cap",
    0x0008: "hardware slowdown",
    0x0010: "sync boost",
    0x0020: "software thermal slowdown",
    0x0040: "hardware thermal slowdown",
    0x0080: "hardware power brake",
    0x0100: "display clock setting",
}
_NVML_CLOCK_SM, _NVML_CLOCK_MEMORY = 1, 2
_NVML_TEMPERATURE_GPU = 0

# Names of the integrated GPU's node in the device tree: Orin, Xavier, TX2, and newer kernels.
_TEGRA_GPUS = {"gpu", "ga10b", "gv11b", "gp10b"}
_OVER_CURRENT = {
    1: "under-voltage (OC1)",
    2: "average over-current (OC2)",
    3: "instantaneous over-current (OC3)",
}


class Accelerator(BaseModel):
    """One reading of an accelerator.

    Attributes:
        name: As the driver or the device tree says.
        source: Where it was read.
        driver: Version of the driver, of Jetson Linux on a Jetson.
        clock_mhz: Current clock of the compute units.
        memory_clock_mhz: Current memory clock; a Jetson shows it to root only.
        max_clock_mhz: Highest clock the current mode allows.
        power_mode: nvpmodel's mode on a Jetson, the power limit elsewhere.
        throttling: Why it runs slower than it could, right now.
        throttle_events: Events counted since boot by name; empty where the device has no counters.
        temperature_c: Of the GPU.
        integrated: On one chip with the processor, whose throttling it shares.
    """

    name: str
    source: Literal["nvml", "sysfs"]
    driver: str = "unreadable"
    clock_mhz: float | Unreadable = "unreadable"
    memory_clock_mhz: float | Unreadable = "unreadable"
    max_clock_mhz: float | Unreadable = "unreadable"
    power_mode: str = "unreadable"
    throttling: list[str] | Unreadable = "unreadable"
    throttle_events: dict[str, int] | Unreadable = "unreadable"
    temperature_c: float | Unreadable = "unreadable"
    integrated: bool = False


def read_accelerator() -> Accelerator | None:
    """Reads this machine's accelerator, ``None`` where there is none that can be asked.

    A Jetson is asked through sysfs, since its NVML knows neither clocks nor reasons.
    """
    tegra = read_tegra()
    return tegra if tegra is not None else _read_installed_nvml()


def read_tegra(root: Path = Path("/")) -> Accelerator | None:
    """Reads a Jetson's integrated GPU from the files below ``root``; ``None`` elsewhere."""
    gpu = _tegra_gpu(root / "sys/class/devfreq")
    if gpu is None:
        return None
    return Accelerator(
        name=read_text(root / "sys/firmware/devicetree/base/model") or "Jetson",
        source="sysfs",
        driver=_jetson_linux(root / "etc/nv_tegra_release"),
        clock_mhz=_mega(read_number(gpu / "cur_freq")),
        max_clock_mhz=_mega(read_number(gpu / "max_freq")),
        memory_clock_mhz=_mega(read_number(root / "sys/kernel/debug/bpmp/debug/clk/emc/rate")),
        power_mode=_nvpmodel(root),
        throttling=_alerts(root / "sys/class/thermal"),
        throttle_events=_over_current(root / "sys/class/hwmon"),
        temperature_c=_gpu_temperature(root / "sys/class/thermal"),
        integrated=True,
    )


def _tegra_gpu(devfreq: Path) -> Path | None:
    for device in sorted(devfreq.glob("*")):
        if read_text(device / "device/of_node/name") in _TEGRA_GPUS:
            return device
    return None


def _jetson_linux(path: Path) -> str:
    """The release from its first line, ``# R36 (release), REVISION: 4.3, GCID: …``."""
    found = re.match(r"#\s*R(\d+)\s*\(release\),\s*REVISION:\s*([\d.]+)", read_text(path) or "")
    return f"Jetson Linux {found[1]}.{found[2]}" if found else "unreadable"


def _nvpmodel(root: Path) -> str:
    """The mode nvpmodel has set (``pmode:0002``), with its name from nvpmodel's configuration."""
    status = re.match(r"pmode:(\d+)", read_text(root / "var/lib/nvpmodel/status") or "")
    if status is None:
        return "unreadable"
    mode = int(status[1])
    models = read_text(root / "etc/nvpmodel.conf") or ""
    name = re.search(rf"<\s*POWER_MODEL\s+ID={mode}\s+NAME=(\S+?)\s*>", models)
    return f"{name[1]} (nvpmodel {mode})" if name else f"nvpmodel {mode}"


def _alerts(thermal: Path) -> list[str] | Unreadable:
    """Throttle alerts that are on; a fan or a frequency governor's cooling device is not one."""
    alerts = [
        (kind, read_number(device / "cur_state"))
        for device in sorted(thermal.glob("cooling_device*"))
        if (kind := read_text(device / "type") or "").endswith("-alert")
    ]
    if not alerts or any(state is None for _, state in alerts):
        return "unreadable"
    return [kind for kind, state in alerts if state]


def _over_current(hwmon: Path) -> dict[str, int] | Unreadable:
    for device in sorted(hwmon.glob("hwmon*")):
        if read_text(device / "name") == "soctherm_oc":
            counts = {
                name: read_number(device / f"oc{channel}_event_cnt")
                for channel, name in _OVER_CURRENT.items()
            }
            known = {name: count for name, count in counts.items() if count is not None}
            return known if len(known) == len(counts) else "unreadable"
    return "unreadable"


def _gpu_temperature(thermal: Path) -> float | Unreadable:
    for zone in sorted(thermal.glob("thermal_zone*")):
        # "GPU-therm" up to JetPack 5.0, "gpu-thermal" since. A gated GPU's sensor does not answer.
        if (read_text(zone / "type") or "").lower().startswith("gpu-therm"):
            value = read_number(zone / "temp")
            return value / 1000 if value is not None else "unreadable"
    return "unreadable"


def _read_installed_nvml() -> Accelerator | None:
    """NVML through ``nvidia-ml-py``, where it and a driver are installed."""
    try:
        import pynvml  # type: ignore[import-untyped]
    except ModuleNotFoundError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        return read_nvml(pynvml, os.environ)
    finally:
        pynvml.nvmlShutdown()


def read_nvml(nvml: Any, variables: Mapping[str, str]) -> Accelerator | None:
    """Reads the GPU that CUDA's first device is.

    Args:
        nvml: The module ``pynvml``, initialized, or something that answers like it.
        variables: The environment, for ``CUDA_VISIBLE_DEVICES`` and ``CUDA_DEVICE_ORDER``.

    Returns:
        The reading, ``None`` without a GPU; with several and no word on which of them CUDA uses,
        a reading in which nothing is readable.
    """

    def ask(call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except nvml.NVMLError:
            return None

    count = ask(nvml.nvmlDeviceGetCount)
    if not count:
        return None
    device = _nvml_device(nvml, ask, count, variables)
    if device is None:
        return Accelerator(
            name=f"one of {count} GPUs; CUDA_DEVICE_ORDER=PCI_BUS_ID and CUDA_VISIBLE_DEVICES "
            "would say which",
            source="nvml",
        )
    bits = ask(nvml.nvmlDeviceGetCurrentClocksEventReasons, device)
    return Accelerator(
        name=ask(nvml.nvmlDeviceGetName, device) or "NVIDIA GPU",
        source="nvml",
        driver=ask(nvml.nvmlSystemGetDriverVersion) or "unreadable",
        clock_mhz=_known(ask(nvml.nvmlDeviceGetClockInfo, device, _NVML_CLOCK_SM)),
        memory_clock_mhz=_known(ask(nvml.nvmlDeviceGetClockInfo, device, _NVML_CLOCK_MEMORY)),
        max_clock_mhz=_known(ask(nvml.nvmlDeviceGetMaxClockInfo, device, _NVML_CLOCK_SM)),
        power_mode=_power_limit(
            ask(nvml.nvmlDeviceGetEnforcedPowerLimit, device),
            ask(nvml.nvmlDeviceGetPowerManagementDefaultLimit, device),
        ),
        throttling="unreadable" if bits is None
        else [reason for bit, reason in _NVML_THROTTLES.items() if bits & bit],
        throttle_events={},
        temperature_c=_known(ask(nvml.nvmlDeviceGetTemperature, device, _NVML_TEMPERATURE_GPU)),
    )  # fmt: skip


def _nvml_device(
    nvml: Any, ask: Callable[..., Any], count: int, variables: Mapping[str, str]
) -> Any | None:
    """NVML counts in PCI order and ignores CUDA's variables; CUDA by default counts by speed."""
    first = variables.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    if first.startswith("GPU-"):
        return ask(nvml.nvmlDeviceGetHandleByUUID, first)
    if count == 1:
        return ask(nvml.nvmlDeviceGetHandleByIndex, 0)
    if first.isdigit() and variables.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID":
        return ask(nvml.nvmlDeviceGetHandleByIndex, int(first))
    return None


def _power_limit(limit: int | None, default: int | None) -> str:
    """NVML speaks in milliwatts."""
    if limit is None:
        return "unreadable"
    usual = "" if default in (None, limit) else f" (default {default / 1000:.0f} W)"
    return f"power limit {limit / 1000:.0f} W{usual}"


def _known(value: float | None) -> float | Unreadable:
    return "unreadable" if value is None else float(value)


def _mega(hertz: int | None) -> float | Unreadable:
    return "unreadable" if hertz is None else hertz / 1e6
