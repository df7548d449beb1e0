"""Clocks, power mode and throttling from the recorded files of a Jetson and answers of NVML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.machine.accelerator import Accelerator, read_nvml, read_tegra
from bench.machine.clocks import Clocks, CpuTime, Watch, read_clocks
from bench.machine.environment import Environment, assess_environment, read_machine

RECORDED = Path(__file__).parent / "recorded"
ORIN: dict[str, Any] = json.loads((RECORDED / "agx_orin.json").read_text())
GEFORCE: dict[str, Any] = json.loads((RECORDED / "geforce_nvml.json").read_text())
ONE_GPU: dict[str, str] = {}


def orin(root: Path, *states: str, without: str | None = None) -> Path:
    for state in ("steady", *states):
        for name, content in ORIN[state].items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
    if without is not None:
        (root / without).unlink()
    return root


def orin_clocks(root: Path) -> Clocks:
    return read_clocks(
        root / "sys/devices/system/cpu",
        root / "proc/stat",
        root / "sys/firmware/acpi/platform_profile",
        lambda: read_tegra(root),
    )


class RecordedNvml:
    """Answers like the module ``pynvml`` did when it was recorded; what is not there fails."""

    class NVMLError(Exception):
        pass

    def __init__(self, *states: str, **changes: object) -> None:
        self.answers = {k: v for state in ("steady", *states) for k, v in GEFORCE[state].items()}
        self.answers |= changes
        self.asked: list[object] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: object) -> Any:
            if name.startswith("nvmlDeviceGetHandleBy"):
                self.asked.append(arguments[0])
                return "device"
            answer = self.answers[name]
            if answer == "not supported":
                raise self.NVMLError(answer)
            return answer[str(arguments[-1])] if isinstance(answer, dict) else answer

        return call


def test_orin_is_read_from_its_files(tmp_path: Path) -> None:
    assert read_tegra(orin(tmp_path)) == Accelerator(
        name="NVIDIA Jetson AGX Orin Developer Kit",
        source="sysfs",
        driver="Jetson Linux 36.4.3",
        clock_mhz=1300.5,
        max_clock_mhz=1300.5,
        memory_clock_mhz="unreadable",
        power_mode="MAXN (nvpmodel 0)",
        throttling=[],
        throttle_events={
            "under-voltage (OC1)": 0,
            "average over-current (OC2)": 4,
            "instantaneous over-current (OC3)": 17,
        },
        temperature_c=48.687,
        integrated=True,
    )


def test_a_machine_that_is_no_jetson_has_none(tmp_path: Path) -> None:
    assert read_tegra(tmp_path) is None


@pytest.mark.parametrize(
    ("missing", "field"),
    [
        ("sys/class/devfreq/17000000.gpu/cur_freq", "clock_mhz"),
        ("var/lib/nvpmodel/status", "power_mode"),
        ("sys/class/thermal/cooling_device6/cur_state", "throttling"),
        ("sys/class/hwmon/hwmon3/oc2_event_cnt", "throttle_events"),
    ],
)
def test_what_an_orin_does_not_tell_is_unreadable_and_never_clean(
    tmp_path: Path, missing: str, field: str
) -> None:
    root = orin(tmp_path, without=missing)
    reading = read_tegra(root)
    assert reading is not None and getattr(reading, field) == "unreadable"
    environment = timed(root)
    assert environment.run == "not certified", environment.reasons
    assert len(environment.reasons) == 1


def test_a_mode_without_a_name_keeps_its_number(tmp_path: Path) -> None:
    root = orin(tmp_path, without="etc/nvpmodel.conf")
    (root / "var/lib/nvpmodel/status").write_text("pmode:0003")
    reading = read_tegra(root)
    assert reading is not None and reading.power_mode == "nvpmodel 3"


def timed(root: Path, hot_at: int | None = None, on_gpu: bool = True) -> Environment:
    """A measurement of six readings on the Orin, hot from one of them on."""
    ticks = iter(range(100))
    readings = iter(range(6))

    def read() -> Clocks:
        if next(readings) == hot_at:
            orin(root, "hot")
        return orin_clocks(root)

    watch = Watch(read, lambda: float(next(ticks)))
    before = quiet(orin_clocks(root))
    for _ in range(6):
        watch()
    return assess_environment(
        read_machine(), before, quiet(orin_clocks(root)), watch.drift(), on_gpu
    )


def quiet(clocks: Clocks) -> Clocks:
    return clocks.model_copy(update={"cpu_time": CpuTime(total=1, busy=0, stolen=0, own=0)})


def test_a_steady_orin_is_clean_though_it_has_no_counter_per_core(tmp_path: Path) -> None:
    environment = timed(orin(tmp_path))
    assert (environment.run, environment.reasons) == ("clean", [])
    assert environment.drift is not None and environment.drift.readings == 6
    assert environment.after.throttle_count == "unreadable"


def test_an_orin_that_gets_hot_while_timed_says_why(tmp_path: Path) -> None:
    environment = timed(orin(tmp_path), hot_at=3)
    assert environment.run == "disturbed"
    assert environment.reasons == [
        "GPU clock moved between 931 and 1300 MHz while timing (1300 at first, 931 at last)",
        "throttled: gpu-throttle-alert",
        "throttled: 6 × instantaneous over-current (OC3)",
    ]


def test_on_one_chip_throttling_disturbs_the_processor_too(tmp_path: Path) -> None:
    reasons = timed(orin(tmp_path), hot_at=3, on_gpu=False).reasons
    assert "throttled: gpu-throttle-alert" in reasons
    assert not any("GPU clock" in reason for reason in reasons)


def test_desktop_gpu_is_read_from_nvml() -> None:
    assert read_nvml(RecordedNvml(), ONE_GPU) == Accelerator(
        name="NVIDIA GeForce RTX 4080",
        source="nvml",
        driver="580.95.05",
        clock_mhz=2505,
        memory_clock_mhz=10501,
        max_clock_mhz=3105,
        power_mode="power limit 320 W",
        throttling=[],  # clocks locked by the user are no throttling
        throttle_events={},
        temperature_c=61,
    )


def test_throttle_reasons_of_nvml_are_named() -> None:
    reading = read_nvml(RecordedNvml("capped"), ONE_GPU)
    assert reading is not None
    assert reading.throttling == ["software power cap", "software thermal slowdown"]
    assert reading.power_mode == "power limit 250 W (default 320 W)"


def test_what_nvml_does_not_support_is_unreadable() -> None:
    refused = dict.fromkeys(
        ("nvmlDeviceGetClockInfo", "nvmlDeviceGetCurrentClocksEventReasons"), "not supported"
    )
    reading = read_nvml(RecordedNvml(**refused), ONE_GPU)
    assert reading is not None
    assert (reading.clock_mhz, reading.throttling) == ("unreadable", "unreadable")
    assert read_nvml(RecordedNvml(nvmlDeviceGetCount=0), ONE_GPU) is None


def test_of_several_gpus_only_a_named_one_is_read() -> None:
    nvml = RecordedNvml(nvmlDeviceGetCount=4)
    unknown = read_nvml(nvml, {"CUDA_VISIBLE_DEVICES": "2"})  # CUDA's order is not NVML's
    assert unknown is not None and unknown.clock_mhz == "unreadable"
    assert nvml.asked == []
    read_nvml(nvml, {"CUDA_VISIBLE_DEVICES": "2,1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"})
    read_nvml(nvml, {"CUDA_VISIBLE_DEVICES": "GPU-8f1c"})
    assert nvml.asked == [2, "GPU-8f1c"]


def desktop(*states: str, gpu: bool = True) -> Clocks:
    return Clocks(
        governor="performance",
        frequency_mhz=[5000.0],
        throttle_count=0,
        cpu_time=CpuTime(total=1, busy=0, stolen=0, own=0),
        accelerator=read_nvml(RecordedNvml(*states), ONE_GPU) if gpu else None,
    )


def judged(readings: list[Clocks], on_gpu: bool = True) -> Environment:
    source, ticks = iter(readings), iter(range(100))
    watch = Watch(lambda: next(source), lambda: float(next(ticks)))
    for _ in readings:
        watch()
    return assess_environment(read_machine(), readings[0], readings[-1], watch.drift(), on_gpu)


def test_desktop_runs_are_judged_by_what_happened_between_the_calls() -> None:
    assert judged([desktop()] * 3).run == "clean"
    dip = judged([desktop(), desktop("capped"), desktop()])
    assert dip.reasons == [
        "GPU clock moved between 1965 and 2505 MHz while timing (2505 at first, 2505 at last)",
        "throttled: software power cap",
        "throttled: software thermal slowdown",
    ]
    assert judged([desktop(), desktop("capped"), desktop()], on_gpu=False).run == "clean"


def test_a_gpu_nobody_can_ask_never_certifies() -> None:
    environment = judged([desktop(gpu=False)] * 2)
    assert environment.run == "not certified"
    assert "GPU clocks unreadable" in environment.reasons[0]
    silent = desktop()
    assert silent.accelerator is not None
    silent.accelerator.clock_mhz = "unreadable"
    assert judged([desktop(), silent, desktop()]).run == "not certified"


def test_watch_reads_at_once_and_then_every_quarter_second() -> None:
    at = [0.0]
    watch = Watch(lambda: Clocks(), lambda: at[0])
    for moment in (0.0, 0.1, 0.2, 0.26, 0.3, 0.6):
        at[0] = moment
        watch()
    assert len(watch.readings) == 3
    assert Watch(lambda: Clocks()).drift().gpu_mhz == "unreadable"


def test_a_cpu_clock_that_dips_while_timing_is_noted() -> None:
    slow = desktop().model_copy(update={"frequency_mhz": [3000.0]})
    environment = judged([desktop(), slow, desktop()], on_gpu=False)
    assert environment.reasons == [
        "mean core frequency moved between 3000 and 5000 MHz while timing "
        "(5000 at first, 5000 at last)"
    ]
