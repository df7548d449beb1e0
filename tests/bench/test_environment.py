"""Clocks from recorded files, and the verdict on a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.machine.clocks import Clocks, CpuTime, read_clocks
from bench.machine.environment import assess_environment, read_machine


def sysfs(root: Path, governor: str = "performance", mhz: tuple[int, ...] = (3000, 3000)) -> Path:
    for core, frequency in enumerate(mhz):
        folder = root / f"cpu{core}"
        (folder / "cpufreq").mkdir(parents=True)
        (folder / "thermal_throttle").mkdir()
        (folder / "cpufreq/scaling_governor").write_text(governor + "\n")
        (folder / "cpufreq/scaling_cur_freq").write_text(f"{frequency * 1000}\n")
        (folder / "thermal_throttle/core_throttle_count").write_text("2\n")
    (root / "cpufreq").mkdir()  # not a core
    return root


def readable(**changes: object) -> Clocks:
    clocks = Clocks(
        governor="performance",
        frequency_mhz=[3000.0, 3000.0],
        throttle_count=4,
        cpu_time=CpuTime(total=100, busy=50, stolen=0, own=10),
    )
    return clocks.model_copy(update=changes)


LATER = CpuTime(total=200, busy=100, stolen=0, own=58)


def test_reads_every_core(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu  1000 100 400 5000 50 30 20 200 0 0\ncpu0 1 2 3\n")
    clocks = read_clocks(sysfs(tmp_path / "cpu"), stat)
    assert clocks.governor == "performance"
    assert clocks.frequency_mhz == [3000.0, 3000.0]
    assert clocks.throttle_count == 4
    assert clocks.cpu_time != "unreadable"
    assert clocks.cpu_time.busy / clocks.cpu_time.total == pytest.approx(1550 / 6800)
    assert clocks.cpu_time.stolen / clocks.cpu_time.total == pytest.approx(200 / 6800)


def test_one_silent_core_makes_a_reading_unreadable(tmp_path: Path) -> None:
    root = sysfs(tmp_path)
    (root / "cpu1/cpufreq/scaling_cur_freq").unlink()
    (root / "cpu1/thermal_throttle/core_throttle_count").write_text("<unsupported>\n")
    clocks = read_clocks(root)
    assert clocks.governor == "performance"
    assert (clocks.frequency_mhz, clocks.throttle_count) == ("unreadable", "unreadable")


def test_nothing_readable(tmp_path: Path) -> None:
    assert read_clocks(tmp_path, tmp_path / "stat") == Clocks()


def test_readable_and_steady_is_clean() -> None:
    environment = assess_environment(read_machine(), readable(), readable(cpu_time=LATER))
    assert (environment.run, environment.reasons) == ("clean", [])


@pytest.mark.parametrize("field", ["governor", "frequency_mhz", "throttle_count", "cpu_time"])
def test_an_unreadable_clock_never_certifies(field: str) -> None:
    for before, after in (
        (readable(**{field: "unreadable"}), readable(cpu_time=LATER)),
        (readable(), readable(**{"cpu_time": LATER, field: "unreadable"})),
    ):
        environment = assess_environment(read_machine(), before, after)
        assert environment.run == "not certified"
        assert len(environment.reasons) == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"frequency_mhz": [2000.0, 3000.0]}, "fell from 3000 to 2500 MHz"),
        ({"throttle_count": 7}, "3 thermal throttling events"),
        ({"governor": "powersave"}, "powersave"),
        ({"cpu_time": CpuTime(total=200, busy=100, stolen=0, own=30)}, "other processes took 30 %"),
        ({"cpu_time": CpuTime(total=200, busy=60, stolen=5, own=20)}, "withheld 5 %"),
    ],
)
def test_what_disturbs_a_run(changes: dict[str, object], reason: str) -> None:
    environment = assess_environment(
        read_machine(), readable(), readable(**{"cpu_time": LATER, **changes})
    )
    assert environment.run == "disturbed"
    assert len(environment.reasons) == 1
    assert reason in environment.reasons[0]


def test_machine_names_what_the_result_depends_on() -> None:
    machine = read_machine({"some-runtime": "9.1"})
    assert machine.packages["some-runtime"] == "9.1"
    assert machine.packages["numpy"][0].isdigit()
    assert 1 <= machine.cores_usable <= machine.cores
