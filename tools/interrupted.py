"""Kills trainings and fills their disk at random moments; each must end with undisturbed weights.

python -m tools.interrupted --kills 25 --full-disks 10 --out docs/measured/interrupted.json

A training is a process forked from this one, so that a moment falls into the training and not into
imports. A full disk is a tmpfs of our own, which needs the right to mount one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from detr.cli_support import progress
from detr.data.synth import generate
from detr.errors import UserError
from distill.recipe import Recipe
from distill.training.loop import train
from distill.training.run_dir import RunDir

SIZE = (64, 128)


def small_recipe(scenes: Path) -> Recipe:
    """Eight steps that write all the time: a checkpoint each, a measured model every second."""
    backbone = {"name": "test_resnet", "strides": [8, 16]}
    return Recipe.model_validate(
        {
            "name": "interrupted",
            "data": {"train": f"kitti:{scenes}:train", "val": f"kitti:{scenes}:val"},
            "input": {"size": SIZE},
            "detector": {
                "backbone": backbone,
                "neck": {"levels": 3},
                "width": 32,
                "attention_heads": 2,
                "dropout": 0.1,
                "encoder": {"layers": 1, "ffn": 32, "points": 2},
                "queries": {"kind": "mixed", "number": 12, "denoising": {"number": 10}},
                "decoder": {
                    "layers": 2,
                    "ffn": 32,
                    "cross_attention": {"points": 2},
                    "refinement": {"kind": "look_forward_twice"},
                },
            },
            "optimizer": {"lr": 1e-3, "warmup_steps": 2, "drops": [0.8]},
            "steps": 8,
            "batch_size": 2,
            "ema": 0.9,
            "checkpoint_every": 1,
            "validation": {"every": 2},
        }
    )


def begin(recipe: Recipe, run: Path) -> int:
    """Starts the training in a process of its own; returns the process's number."""
    sys.stderr.flush()
    if (child := os.fork()) != 0:
        return child
    status = 1
    with contextlib.suppress(BaseException), open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
        try:
            train(recipe, run)
            status = 0
        except UserError as error:
            status = 28 if error.code == "disk-full" else 2
    os._exit(status)


def status_of(child: int) -> int:
    """Waits for a process; its exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def differences(run: Path, undisturbed: Path, recipe: Recipe) -> list[str]:
    """What of a run is not as in the undisturbed one."""
    found = []
    for path in sorted(undisturbed.glob("*.safetensors")):
        if (run / path.name).read_bytes() != path.read_bytes():
            found.append(path.name)
    ours, theirs = (RunDir(x, recipe).load_checkpoint() for x in (run, undisturbed))
    if not _equal(ours, theirs):
        found.append("checkpoints/last.pt")
    facts = [json.loads((x / "model.json").read_text())["provenance"] for x in (run, undisturbed)]
    if facts[0] != facts[1]:
        found.append("model.json")
    names = {str(p.relative_to(run)) for p in run.rglob("*")}
    found += sorted(names - {str(p.relative_to(undisturbed)) for p in undisturbed.rglob("*")})
    rows = [json.loads(line)["step"] for line in (run / "metrics.jsonl").open()]
    if rows != sorted(rows) or rows[-1] != recipe.steps:
        found.append("metrics.jsonl")
    return found


def _equal(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(_equal(ours[k], theirs[k]) for k in ours)
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(_equal, ours, theirs))
    return bool(ours == theirs)


def steps_done(run: Path, recipe: Recipe) -> int:
    """Of the checkpoint that an interruption left."""
    if not (run / "recipe.yaml").exists():
        return 0
    checkpoint = RunDir(run, recipe).load_checkpoint()
    return 0 if checkpoint is None else int(checkpoint["step"])


def kill_once(recipe: Recipe, run: Path, seconds: float) -> int | None:
    """Kills a training after some time; the steps that were kept, or None if it was over."""
    child = begin(recipe, run)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)  # nobody has waited for it, so the number is still its own
    killed = status_of(child) == -signal.SIGKILL
    return steps_done(run, recipe) if killed else None


@contextlib.contextmanager
def small_disk(place: Path, bytes_: int) -> Iterator[None]:
    """A file system of a size, mounted at a folder."""
    place.mkdir()
    call = ["mount", "-t", "tmpfs", "-o", f"size={bytes_}", "tmpfs", str(place)]
    subprocess.run(call, check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def fill_once(recipe: Recipe, disk: Path, seconds: float) -> int | None:
    """Fills the disk of a training after some time; the steps that were kept, or None if over."""
    run = disk / "run"
    child = begin(recipe, run)
    time.sleep(seconds)
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:  # until there is not a byte more
            file.write(bytes(4096))
    status = status_of(child)
    if status not in (0, 28):
        raise RuntimeError(f"a training on a full disk ended with status {status}")
    filler.unlink()
    return None if status == 0 else steps_done(run, recipe)


def repeat(times: int, name: str, interrupt: Callable[[int], dict[str, Any] | None]) -> list[Any]:
    """Interrupts so many trainings; one that was over already does not count."""
    rows: list[dict[str, Any]] = []
    trial = 0
    with progress(range(times), name, times) as bar:
        while len(rows) < times:
            trial += 1
            if (row := interrupt(trial)) is not None:
                rows.append(row)
                bar.update()
    return rows


def main() -> None:
    """Runs everything and writes what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--full-disks", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    draw = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        generate(folder / "scenes", images=10, size=SIZE, seed=3, format="kitti")
        recipe = small_recipe(folder / "scenes")
        undisturbed = folder / "undisturbed"
        start = time.perf_counter()
        assert status_of(begin(recipe, undisturbed)) == 0
        seconds = time.perf_counter() - start
        size = sum(path.stat().st_size for path in undisturbed.rglob("*") if path.is_file())

        def kill(trial: int) -> dict[str, Any] | None:
            run, after = folder / f"killed-{trial}", draw.uniform(0, seconds)
            kept = kill_once(recipe, run, after)
            if kept is None:
                return None
            assert status_of(begin(recipe, run)) == 0
            wrong = differences(run, undisturbed, recipe)
            shutil.rmtree(run)
            return {"seconds": round(after, 2), "steps kept": kept, "differs": wrong}

        def fill(trial: int) -> dict[str, Any] | None:
            disk, after = folder / f"disk-{trial}", draw.uniform(0, seconds)
            with small_disk(disk, 4 * size):
                kept = fill_once(recipe, disk, after)
                if kept is None:
                    return None
                assert status_of(begin(recipe, disk / "run")) == 0
                wrong = differences(disk / "run", undisturbed, recipe)
            return {"seconds": round(after, 2), "steps kept": kept, "differs": wrong}

        result = {
            "steps": recipe.steps,
            "seconds undisturbed": round(seconds, 1),
            "killed": repeat(given.kills, "killed", kill),
            "disk full": repeat(given.full_disks, "disk full", fill),
        }
    text = json.dumps(result, indent=2) + "\n"
    if given.out is not None:
        given.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
