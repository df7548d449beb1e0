"""How many threads: the user's word, a container's quota, or the machine."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

from detr import cores
from detr.cli_support import process_threads_option


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("membership", "files", "quota"),
    [
        # Version 2: the tightest of the group and those above it; a container's own is the root.
        ("0::/a/b\n", {"a/cpu.max": "150000 100000\n", "a/b/cpu.max": "max 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "400000 100000\n"}, 4.0),
        ("0::/a\n", {"a/cpu.max": "max 100000\n"}, None),
        # Version 1, where a container often sees the host's path but only its own files.
        (
            "4:cpu,cpuacct:/docker/x\n0::/\n",
            {
                "cpu,cpuacct/cpu.cfs_quota_us": "250000\n",
                "cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            2.5,
        ),
        (
            "1:cpu:/k/p\n",
            {"cpu/k/p/cpu.cfs_quota_us": "-1\n", "cpu/k/p/cpu.cfs_period_us": "100000\n"},
            None,
        ),
        ("3:cpuset:/\n", {"cpu/cpu.cfs_quota_us": "100000\n"}, None),
        ("0::/\n", {"cpu.max": "none of it\n"}, None),
    ],
)
def test_quotas_of_both_kinds_of_control_groups(
    tmp_path: Path, membership: str, files: dict[str, str], quota: float | None
) -> None:
    write(tmp_path / "self", membership)
    for name, text in files.items():
        write(tmp_path / "groups" / name, text)
    assert cores.cpu_quota(tmp_path / "groups", tmp_path / "self") == quota


def test_no_control_groups_no_limit(tmp_path: Path) -> None:
    assert cores.cpu_quota(tmp_path, tmp_path / "missing") is None


@pytest.mark.parametrize(
    ("variable", "quota", "threads", "usable"),
    [
        (None, None, None, 8),
        (None, 2.5, 3, 3),
        (None, 0.5, 1, 1),
        (None, 64.0, 8, 8),
        ("5", 2.5, 5, 3),
        ("4,2", None, 4, 8),
        ("", None, None, 8),
        ("many", 2.0, 2, 2),
    ],
)
def test_who_decides_how_many_threads(
    monkeypatch: pytest.MonkeyPatch,
    variable: str | None,
    quota: float | None,
    threads: int | None,
    usable: int,
) -> None:
    monkeypatch.setattr(cores, "cpu_quota", lambda: quota)
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert cores.default_threads() == threads
    assert cores.usable_cores() == usable


def test_a_command_that_says_threads_sets_them_for_torch_and_engines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []

    @click.command()
    @process_threads_option
    def command() -> None:
        seen.append((cores.default_threads(), torch.get_num_threads()))

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    assert CliRunner().invoke(command, ["--threads", "3"]).exit_code == 0
    assert CliRunner().invoke(command, ["--threads", "0"]).exit_code == 2
    assert seen == [(3, 3)]
