"""Cells side by side on Ray: the table is the one made in sequence, whatever dies on the way."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from detr.errors import UserError
from distill.analysis import cells
from distill.analysis.cells import Job, in_processes, on_ray
from distill.analysis.compare_methods import MethodComparison, compare_methods
from distill.cli import main
from distill.recipe import Recipe


def results(table: MethodComparison) -> list[tuple[str, int, dict[str, float], str | None]]:
    """What training decides; seconds and memory are of the machine."""
    return [(c.method, c.seed, c.values, c.error) for c in table.cells]


@pytest.mark.slow
def test_a_killed_worker_changes_nothing_in_the_table(tiny: Recipe, tmp_path: Path) -> None:
    recipe = tiny.model_copy(update={"batch_size": 1, "steps": 6, "checkpoint_every": 1})
    sequence = compare_methods(recipe, ["stable_dino"], 1, tmp_path / "one", in_processes(1))
    assert all(error is None for *_, error in results(sequence))

    killed: list[int] = []
    folder = tmp_path / "ray" / "cells" / "stable_dino-seed0"

    def kill() -> None:
        """Ends the process that trains the second cell once it has a checkpoint to go on from."""
        until = time.monotonic() + 600
        while not (folder / "checkpoints" / "last.pt").exists() and time.monotonic() < until:
            time.sleep(0.05)
        for pid in (int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()):
            if pid != os.getpid() and _trains(pid, folder):
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)

    killer = threading.Thread(target=kill)
    killer.start()
    side_by_side = compare_methods(recipe, ["stable_dino"], 1, tmp_path / "ray", on_ray("local", 1))
    killer.join()
    assert len(killed) == 1
    assert results(side_by_side) == results(sequence)


def _trains(pid: int, folder: Path) -> bool:
    """Whether a process holds the run's folder open, as the one that trains in it does."""
    try:
        return any(
            Path(os.readlink(entry)) == folder for entry in Path(f"/proc/{pid}/fd").iterdir()
        )
    except OSError:
        return False


@pytest.mark.slow
def test_what_ray_cannot_do_is_one_line(tmp_path: Path) -> None:
    job = Job(tmp_path / "recipe.yaml", tmp_path / "run", 1)
    with pytest.raises(UserError) as caught:
        list(on_ray("127.0.0.1:1", 1)([job]))
    assert caught.value.code == "ray-unreachable"
    with pytest.raises(UserError) as caught:
        list(on_ray("local", 10_000)([job]))
    assert caught.value.code == "ray-resources"


def test_without_ray_the_extra_is_named(
    tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny.to_yaml())
    call = ["compare", str(path), "--methods", "stable_dino", "--ray", "local"]
    run = CliRunner().invoke(main, [*call, "--out", str(tmp_path / "out")])
    assert run.exit_code == 2 and "[ray]" in run.stderr


def test_steps_of_a_cell_are_those_it_wrote_down(tmp_path: Path) -> None:
    job = Job(tmp_path / "recipe.yaml", tmp_path, 9)
    assert cells._step(job) == 0
    rows = [{"step": 2, "loss": 1.0}, {"step": 4, "loss": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cells._step(job) == 4


def test_threads_reach_the_process_of_a_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}

    class Done:
        returncode = 0

    def run(*_: object, env: dict[str, str], **__: object) -> Done:
        seen.update(env)
        return Done()

    monkeypatch.setattr("distill.analysis.cells.subprocess.run", run)
    job = Job(tmp_path / "recipe.yaml", tmp_path, 9)
    assert list(in_processes(3)([job])) == [(job, None)]
    assert seen["OMP_NUM_THREADS"] == "3"
