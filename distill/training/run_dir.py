"""The run directory: everything a training run leaves behind, and enough to go on with it.

``recipe.yaml`` (complete), ``sources.json``, ``environment.json``, ``metrics.jsonl``,
``matching.jsonl``, ``log.txt``, ``checkpoints/last.pt``, ``model.safetensors`` with ``model.json``,
where there is a weight average the other weights as ``student.safetensors`` or ``ema.safetensors``,
``changes.jsonl`` where a run went on otherwise, ``unreadable.jsonl`` where images were left out,
and what the recipe's loggers keep. Files are replaced in one step, so a full disk or a lost power
supply costs at most the work since the last checkpoint.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pickle
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from detr.cli_support import counted
from detr.errors import UserError
from detr.files import drop_leftovers, output_error, output_folder, write_atomic
from detr.model_info import read_model_info
from detr.sidecar import read_sidecar
from distill.query_owners import OWNERS_FILE
from distill.recipe import Recipe, load_recipe
from distill.training.identity import Change, Sources, changes, moved, source_changes
from distill.training.loggers import Loggers

_PACKAGES = ("detr-distillery", "torch", "torchvision", "timm", "numpy", "scipy")


class RunDir:
    """A run directory; made if absent, checked against the recipe if present.

    Args:
        path: The folder.
        recipe: What the run is. It may differ from the one the folder was made with in what does
            not bind (:mod:`distill.training.identity`).
        writes: False in the further processes of distributed training, which only read.

    Raises:
        UserError: ``run-differs`` naming the first key in which the recipes differ, ``run-busy``,
            ``output-exists`` for a folder of something else, or ``output-unwritable``.
    """

    def __init__(self, path: Path, recipe: Recipe, writes: bool = True) -> None:
        self.path, self.recipe, self.writes = path, recipe, writes
        self._before: Recipe | None = None
        self._changes: list[Change] = []
        self._sources: Sources | None = None
        self._left_out: set[Path] = set()
        self._loggers: Loggers | None = None
        frozen = path / "recipe.yaml"
        # A run that failed before its first step, on a mistyped value most often, binds nobody.
        begun = (path / "metrics.jsonl", self.checkpoint, self.model)
        if frozen.exists() and any(file.exists() for file in begun):
            self._before = self._read(frozen)
            self._changes = changes(path, self._before, recipe)
            return
        if writes:
            if not frozen.exists():
                _check_foreign(path)
            output_folder(path)
            with self.alone():
                write_atomic(frozen, recipe.to_yaml())

    def _read(self, frozen: Path) -> Recipe:
        """What the run was made with, as a recipe: a key that came later has its default."""
        try:
            return load_recipe(frozen)
        except UserError as error:
            raise UserError(
                "run-differs",
                f"{self.path}: cannot go on, its recipe is none of this release ({error.message}); "
                "choose another --out; its model, if it has one, is as good as before",
            ) from error

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keeps other processes out of the run; the system lets go of it whatever happens.

        Raises:
            UserError: ``run-busy`` where another process is in it.
        """
        if not self.writes:
            yield
            return
        folder = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(folder)
            raise UserError(
                "run-busy",
                f"{self.path}: another process is training here; wait for it or choose another "
                "--out",
            ) from error
        try:
            yield
        finally:
            os.close(folder)

    @property
    def checkpoint(self) -> Path:
        """Everything needed to go on."""
        return self.path / "checkpoints" / "last.pt"

    @property
    def model(self) -> Path:
        """Weights for use; ``model.json`` beside it says what they are."""
        return self.path / "model.safetensors"

    def weights(self, name: str) -> Path:
        """The weights that :attr:`model` does not hold: ``student`` or ``ema``, where it is one."""
        return self.path / f"{name}.safetensors"

    def finished(self) -> bool:
        """Whether the model of the last step has been written and, where wanted, measured."""
        sidecar = self.model.with_suffix(".json")
        if not (sidecar.exists() and self.model.exists()):
            return False
        facts, val = read_model_info(sidecar).provenance, self.recipe.data.val
        return facts.get("step") == self.recipe.steps and val in (None, facts.get("val"))

    @property
    def moved(self) -> bool:
        """Whether the recipe's data or teacher are said to lie elsewhere than before."""
        return self._before is not None and moved(self._before, self.recipe)

    def claim(self, sources: Sources) -> None:
        """Notes what lies at the recipe's paths; of a run that goes on it must be the same.

        Raises:
            UserError: ``run-differs``.
        """
        self._sources = sources
        if self._before is None:
            return
        path = self.path / "sources.json"
        before = read_sidecar(path, Sources) if path.exists() else None
        pair = (self._before, before), (self.recipe, sources)
        self._changes += source_changes(self.path, *pair)

    def changes(self) -> list[Change]:
        """Where the run went on otherwise than it began."""
        path = self.path / "changes.jsonl"
        if not path.exists():
            return []
        return [Change.model_validate_json(line) for line in _whole_lines(path)]

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Replaces the checkpoint.

        Raises:
            UserError: ``disk-full`` or ``output-unwritable``; the earlier checkpoint is whole.
        """
        if not self.writes:
            return
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        write_atomic(self.checkpoint, buffer.getvalue())

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The last checkpoint, on the CPU, or None where there is none yet.

        Raises:
            UserError: ``checkpoint-unreadable``, or ``checkpoint-pickle`` for a file with code in
                it, which is not run.
        """
        if not self.checkpoint.exists():
            return None
        try:
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise UserError(
                "checkpoint-pickle",
                f"{self.checkpoint}: holds more than tensors, such as code that would run on "
                "loading it, or is damaged, and was not loaded; delete it to start the run anew",
            ) from error
        except (OSError, RuntimeError, EOFError, ValueError) as error:
            raise UserError(
                "checkpoint-unreadable",
                f"{self.checkpoint}: not a checkpoint of tensors ({type(error).__name__}); "
                "delete it to start the run anew",
            ) from error
        assert isinstance(state, dict)
        return state

    def start(self, step: int) -> None:
        """Notes the environment and what goes on otherwise; drops what will be repeated.

        Args:
            step: Steps already done.

        Raises:
            UserError: ``run-differs`` where more steps are done than the recipe has.
        """
        if step > self.recipe.steps:
            raise UserError(
                "run-differs",
                f"{self.path}: {step} steps are done, steps={self.recipe.steps} were asked for; "
                "choose another --out or more steps",
            )
        if not self.writes:
            return
        for folder in (self.path, self.checkpoint.parent):
            drop_leftovers(folder)
        write_atomic(self.path / "environment.json", json.dumps(environment(), indent=2) + "\n")
        for name in ("metrics.jsonl", OWNERS_FILE):
            lines = self.path / name
            if lines.exists():
                kept = [x for x in _whole_lines(lines) if json.loads(x)["step"] <= step]
                write_atomic(lines, "".join(f"{line}\n" for line in kept))
        for change in self._changes if step else ():
            change = change.model_copy(update={"step": step})
            self.say(str(change))
            self.append("changes.jsonl", change.model_dump_json())
        if self._before is not None and self._before != self.recipe:
            write_atomic(self.path / "recipe.yaml", self.recipe.to_yaml())
        if self._sources is not None:
            write_atomic(self.path / "sources.json", self._sources.model_dump_json() + "\n")

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line to ``metrics.jsonl``; ``step`` counts finished steps."""
        rounded = {key: float(f"{value:.6g}") for key, value in values.items()}
        self.append("metrics.jsonl", json.dumps({"step": step, **rounded}))
        if self._loggers is not None:
            self._loggers.write(step, rounded)

    @contextlib.contextmanager
    def logging(self) -> Iterator[None]:
        """Within it, what is recorded goes to the programs the recipe names as well.

        Raises:
            UserError: ``extra-missing`` or ``logger-start``.
        """
        if self.writes:
            self._loggers = Loggers(self.recipe, self.path, self.say)
        finished = False
        try:
            yield
            finished = True
        finally:
            if self._loggers is not None:
                self._loggers.close(finished)

    def say(self, text: str) -> None:
        """A line for the user: on standard error and, with the time, in ``log.txt``."""
        if self.writes:
            tqdm.write(text, file=sys.stderr)
        self.note([text])

    def leave_out(self, path: Path, error: UserError) -> None:
        """Says and lists an image that could not be read.

        Raises:
            UserError: ``images-unreadable`` where it is one more than ``data.max_unreadable``.
        """
        if path in self._left_out:
            return
        self._left_out.add(path)
        row, listed = json.dumps({"image": str(path), "reason": error.message}), self._listed
        if not listed.exists() or row not in listed.read_text().splitlines():
            self._append(listed.name, row)
        count, limit = len(self._left_out), self.recipe.data.max_unreadable
        if count > limit:
            raise UserError(
                "images-unreadable",
                f"{error.message}; with it {counted(count, 'image')} could not be read, "
                f"data.max_unreadable is {limit} ({listed} lists them)",
            )
        told = f"left out: {error.message} ({count} of at most {limit})"
        tqdm.write(told, file=sys.stderr)
        self.note([told])

    @property
    def _listed(self) -> Path:
        """Images that could not be read; every process of distributed training adds its own."""
        return self.path / "unreadable.jsonl"

    @property
    def left_out(self) -> str:
        """What was left out since the command began, for the run's last line; empty if nothing."""
        if not self._left_out:
            return ""
        images = counted(len(self._left_out), "image")
        return f"; {images} could not be read ({self._listed})"

    def note(self, lines: Sequence[str]) -> None:
        """Lines for ``log.txt`` alone, with the time."""
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        for line in lines:
            self.append("log.txt", f"{now} {line}")

    def append(self, name: str, line: str) -> None:
        """Adds a line to a file of the run."""
        if self.writes:
            self._append(name, line)

    def _append(self, name: str, line: str) -> None:
        path = self.path / name
        try:
            with path.open("a") as file:
                file.write(line + "\n")
        except OSError as error:
            raise output_error(path, error) from error


def _whole_lines(path: Path) -> list[str]:
    """The lines of a JSON Lines file that were written to their end."""
    return [line for line in path.read_text().splitlines() if _is_json(line)]


def _is_json(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _check_foreign(path: Path) -> None:
    """Refuses a folder with folders in it, such as a data set; files may be a log of the command's.

    Raises:
        UserError: ``output-exists``.
    """
    inside = sorted(x.name for x in path.glob("*/")) if path.is_dir() else []
    if inside := [name for name in inside if not name.startswith(".")]:
        raise UserError(
            "output-exists",
            f"{path}: holds {inside[0]} and is no run; choose another --out",
        )


def environment() -> dict[str, Any]:
    """Where a run happens: versions, processor, threads."""
    packages = {}
    for package in _PACKAGES:
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            continue
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "packages": packages,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
