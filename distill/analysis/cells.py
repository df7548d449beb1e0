"""A comparison's cells, trained one after the other or side by side on Ray.

Every cell is a run of its own in a process of its own: one that fails costs no other, the memory
measured is its own, and a cell whose process died goes on from its checkpoint.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detr.cli_support import missing_extra, progress
from detr.errors import UserError

if TYPE_CHECKING:
    from tqdm import tqdm

THREADS = "OMP_NUM_THREADS"
# How often a cell begins again whose process died; each time it goes on from its last checkpoint.
RETRIES = 3
# Seconds between looks at how far the cells are.
LOOK = 1.0
# Seconds until a cluster must have answered.
CONNECT = 10.0


@dataclass(frozen=True)
class Job:
    """One cell to train.

    Attributes:
        recipe: Its recipe file.
        folder: Its run directory.
        steps: How many it takes.
    """

    recipe: Path
    folder: Path
    steps: int


# Trains jobs; gives each back when it has ended, with what went wrong or ``None``.
Runner = Callable[[Sequence[Job]], Iterator[tuple[Job, str | None]]]


def in_sequence(train: Callable[[Path, Path], str | None]) -> Runner:
    """A runner that calls ``train(recipe, folder)`` for one job after the other."""

    def run(jobs: Sequence[Job]) -> Iterator[tuple[Job, str | None]]:
        for job in progress(jobs, "compare", len(jobs)):
            yield job, train(job.recipe, job.folder)

    return run


def in_processes(threads: int | None) -> Runner:
    """A runner with a process for each job, one after the other.

    Args:
        threads: Of each; torch's own choice for ``None``.
    """
    environment = os.environ if threads is None else {**os.environ, THREADS: str(threads)}

    def train(recipe: Path, folder: Path) -> str | None:
        call = "import sys; from distill.analysis.cells import main; main(*sys.argv[1:])"
        done = subprocess.run(
            [sys.executable, "-c", call, str(recipe), str(folder)],
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env=environment,
        )
        if done.returncode == 0:
            return None
        lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip()]
        return lines[-1].strip() if lines else f"ended with status {done.returncode}"

    return in_sequence(train)


def main(recipe: str, folder: str) -> None:
    """What a cell's process does."""
    from distill.recipe import load_recipe
    from distill.training.loop import train

    try:
        train(load_recipe(Path(recipe)), Path(folder))
    except UserError as error:
        sys.exit(f"error[{error.code}]: {error.message}")


def on_ray(address: str, threads: int) -> Runner:
    """A runner that trains jobs side by side: one for each GPU, or for each ``threads`` cores.

    Ray begins a cell again whose worker died, up to three times. Recipes, data, teacher and the
    output folder must lie under the same paths on every machine.

    Args:
        address: ``local``, or a cluster as ``ray.init`` takes it, such as ``auto``.
        threads: Of each job.

    Raises:
        UserError: ``extra-missing`` without Ray, ``ray-unreachable``, or ``ray-resources`` where no
            machine has that many cores.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise missing_extra(error, "distill compare --ray") from error
    return lambda jobs: _run_on_ray(ray, address, threads, jobs)


def _run_on_ray(
    ray: Any, address: str, threads: int, jobs: Sequence[Job]
) -> Iterator[tuple[Job, str | None]]:
    _reachable(address)
    try:
        ray.init(address, log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError("ray-unreachable", f"--ray {address}: {_last_line(error)}") from error
    waiting: dict[Any, Job] = {}
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        most = max(int(node.get("CPU", 0)) for node in nodes)
        if threads > most:
            raise UserError(
                "ray-resources", f"--threads {threads}: no machine of Ray's has more than {most}"
            )
        # A worker ends with its cell, so the memory a cell is measured by is its own.
        train = ray.remote(
            num_cpus=threads,
            num_gpus=int(any(node.get("GPU", 0) for node in nodes)),
            max_calls=1,
            max_retries=RETRIES,
            runtime_env={"env_vars": {THREADS: str(threads), "OMP_WAIT_POLICY": "PASSIVE"}},
        )(train_cell)
        place = str(Path.cwd())
        for job in jobs:
            waiting[train.remote(str(job.recipe), str(job.folder), place)] = job
        total = sum(job.steps for job in jobs)
        nothing: Sequence[Job] = ()  # the bar counts steps, which come from elsewhere
        with progress(nothing, "compare", total) as bar:
            while waiting:
                done, _ = ray.wait(list(waiting), num_returns=1, timeout=LOOK)
                for reference in done:
                    job = waiting.pop(reference)
                    yield job, _outcome(ray, reference, job)
                _show(bar, jobs, [*waiting.values()])
    finally:
        # Of a cluster that others use, only these cells end.
        for reference in waiting:
            ray.cancel(reference, force=True)
        ray.shutdown()


def _reachable(address: str) -> None:
    """Ray itself waits minutes for a machine that does not answer.

    Raises:
        UserError: ``ray-unreachable`` where nothing listens there.
    """
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not (colon and port.isdigit()):
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT).close()
    except (OSError, OverflowError) as error:
        raise UserError("ray-unreachable", f"--ray {address}: {error}") from error


def _outcome(ray: Any, reference: Any, job: Job) -> str | None:
    try:
        error: str | None = ray.get(reference)
    except ray.exceptions.RayError as failure:
        return _last_line(failure)
    if error is None and not (job.folder / "metrics.jsonl").exists():
        return f"{job.folder}: trained, but its folder is not seen here; Ray needs a shared one"
    return error


def train_cell(recipe: str, folder: str, place: str) -> str | None:
    """What a worker of Ray's does: one cell, in the folder the command was given in.

    Returns:
        What went wrong, as of a cell in a process of its own.
    """
    log = Path(place, folder).with_suffix(".log")
    os.chdir(place)  # the worker ends with its cell
    with log.open("a") as sink, redirect_stderr(sink):
        try:
            main(recipe, folder)
        except SystemExit as error:
            return str(error.code)
        except Exception as error:  # the cell's fault is a line in the table
            return f"{type(error).__name__}: {_last_line(error)}"
    return None


def _show(bar: tqdm[Any], jobs: Sequence[Job], waiting: Sequence[Job]) -> None:
    """All cells in one bar of steps, and behind it those that are at work."""
    steps = {job: _step(job) for job in waiting}
    bar.n = sum(steps.get(job, job.steps) for job in jobs)
    begun = [f"{job.folder.name} {step}/{job.steps}" for job, step in steps.items() if step]
    bar.set_postfix_str(", ".join(begun), refresh=False)
    bar.update(0)


def _step(job: Job) -> int:
    """The last step a cell wrote down."""
    path = job.folder / "metrics.jsonl"
    try:
        last = path.read_text().splitlines()[-1]
        return int(json.loads(last)["step"])
    except (OSError, IndexError, ValueError, KeyError):  # not begun, or in the middle of a line
        return 0


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
