"""The run directory: everything a training run leaves behind, and enough to go on with it.

``recipe.yaml`` (complete), ``environment.json``, ``metrics.jsonl``, ``matching.jsonl``,
``log.txt``, ``checkpoints/last.pt``, ``model.safetensors`` with ``model.json``, and
``tensorboard/`` where asked for. Files are replaced in one step, so a full disk or a lost power
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
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from detr.cli_support import missing_extra
from detr.errors import UserError
from detr.files import output_error, output_folder, write_atomic
from detr.model_info import read_model_info
from distill.recipe import Recipe, load_recipe

_PACKAGES = ("detr-distillery", "torch", "torchvision", "timm", "numpy", "scipy")


class RunDir:
    """A run directory; made if absent, checked against the recipe if present.

    Args:
        path: The folder.
        recipe: What the run is; must equal the one the folder was made with.
        writes: False in the further processes of distributed training, which only read.

    Raises:
        UserError: ``run-differs`` naming the first key in which the recipes differ, ``run-busy``,
            or ``output-unwritable``.
    """

    def __init__(self, path: Path, recipe: Recipe, writes: bool = True) -> None:
        self.path, self.recipe, self.writes = path, recipe, writes
        frozen = path / "recipe.yaml"
        # A run that failed before its first step, on a mistyped value most often, binds nobody.
        begun = (path / "metrics.jsonl", self.checkpoint, self.model)
        if frozen.exists() and any(file.exists() for file in begun):
            self._check_same(frozen)
            return
        if writes:
            output_folder(path)
            with self.alone():
                write_atomic(frozen, recipe.to_yaml())

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

    def _check_same(self, frozen: Path) -> None:
        # Read as a recipe, so that a key that came later has its default on both sides.
        before = _flatten(load_recipe(frozen).model_dump(mode="json"))
        now = _flatten(self.recipe.model_dump(mode="json"))
        for key in [*now, *before]:
            if before.get(key) != now.get(key):
                raise UserError(
                    "run-differs",
                    f"{self.path}: was made with {key}={before.get(key)}, now asked for "
                    f"{now.get(key)}; choose another --out or the same recipe",
                )

    @property
    def checkpoint(self) -> Path:
        """Everything needed to go on."""
        return self.path / "checkpoints" / "last.pt"

    @property
    def model(self) -> Path:
        """Weights for use; ``model.json`` beside it says what they are."""
        return self.path / "model.safetensors"

    def finished(self) -> bool:
        """Whether the model of the last step has been written."""
        sidecar = self.model.with_suffix(".json")
        if not (sidecar.exists() and self.model.exists()):
            return False
        return bool(read_model_info(sidecar).provenance.get("step") == self.recipe.steps)

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
        """Notes the environment and drops metrics from steps that will be repeated."""
        if not self.writes:
            return
        write_atomic(self.path / "environment.json", json.dumps(environment(), indent=2) + "\n")
        metrics = self.path / "metrics.jsonl"
        if metrics.exists():
            kept = [
                line
                for line in metrics.read_text().splitlines()
                if line.endswith("}") and json.loads(line)["step"] <= step
            ]
            write_atomic(metrics, "".join(f"{line}\n" for line in kept))

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line to ``metrics.jsonl``; ``step`` counts finished steps."""
        rounded = {key: float(f"{value:.6g}") for key, value in values.items()}
        self.append("metrics.jsonl", json.dumps({"step": step, **rounded}))
        if self.recipe.tensorboard and self.writes:
            for key, value in rounded.items():
                self._board.add_scalar(key, value, step)

    @cached_property
    def _board(self) -> Any:
        # Imported here: it costs seconds, and only who asks for it has it.
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise missing_extra(error, "tensorboard: true") from error
        return SummaryWriter(str(self.path / "tensorboard"))

    def say(self, text: str) -> None:
        """A line for the user: on standard error and, with the time, in ``log.txt``."""
        if self.writes:
            tqdm.write(text, file=sys.stderr)
        self.note([text])

    def note(self, lines: Sequence[str]) -> None:
        """Lines for ``log.txt`` alone, with the time."""
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        for line in lines:
            self.append("log.txt", f"{now} {line}")

    def append(self, name: str, line: str) -> None:
        """Adds a line to a file of the run."""
        if not self.writes:
            return
        path = self.path / name
        try:
            with path.open("a") as file:
                file.write(line + "\n")
        except OSError as error:
            raise output_error(path, error) from error


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


def _flatten(value: Any, key: str = "") -> dict[str, Any]:
    """Nested mappings and lists as one mapping with dotted keys."""
    items: list[tuple[str, Any]]
    if isinstance(value, dict):
        items = [(str(k), v) for k, v in value.items()]
    elif isinstance(value, list):
        items = [(str(i), v) for i, v in enumerate(value)]
    else:
        return {key: value}
    flat: dict[str, Any] = {}
    for name, inner in items:
        flat.update(_flatten(inner, f"{key}.{name}" if key else name))
    return flat
