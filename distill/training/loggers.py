"""The lines of ``metrics.jsonl`` for programs people watch their runs with.

Each is asked for by its key in a recipe, and takes everything else (server, project, account) from
its own environment variables. ``metrics.jsonl`` has it all in any case, so a program that fails in
the middle of a run is left out from there on and costs no training.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from detr.cli_support import missing_extra
from detr.errors import UserError
from detr.files import write_atomic
from distill.recipe import Recipe

# What the programs call this run, so that one that goes on is the same to them.
_IDS = "loggers.json"


class Logger(Protocol):
    """Takes what a run records; made from the recipe and the run directory."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Takes the numbers of one line; ``step`` counts finished steps."""

    def close(self, finished: bool) -> None:
        """The run ends: at its last step, or before it."""


class TensorBoard:
    """Event files in ``tensorboard/`` of the run directory."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / "tensorboard"))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See :class:`Logger`."""
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def close(self, finished: bool) -> None:
        """See :class:`Logger`."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases; ``WANDB_MODE=offline`` needs no account."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        import wandb

        own = _known_id(folder, "wandb") or secrets.token_hex(4)
        self._run: Any = wandb.init(
            id=own,
            resume="allow",
            name=recipe.name,
            dir=str(folder),
            config=recipe.model_dump(mode="json"),
        )
        _note_id(folder, "wandb", own)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See :class:`Logger`."""
        self._run.log(dict(values), step=step)

    def close(self, finished: bool) -> None:
        """See :class:`Logger`."""
        self._run.finish(exit_code=0 if finished else 1)


class MLflow:
    """A run of MLflow, where ``MLFLOW_TRACKING_URI`` says, with the recipe as its artifact."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        import mlflow
        from mlflow.entities import Metric

        self._metric: Callable[..., Any] = Metric
        self._client: Any = mlflow.MlflowClient()
        run = _known_id(folder, "mlflow")
        if run is None:
            # Chooses the experiment as MLflow does: by its environment variables.
            with mlflow.start_run(run_name=recipe.name) as made:
                run = str(made.info.run_id)
            _note_id(folder, "mlflow", run)
        self._run = run
        self._client.update_run(run, status="RUNNING")
        self._client.log_artifact(run, str(folder / "recipe.yaml"))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See :class:`Logger`."""
        now = int(time.time() * 1e3)
        metrics = [self._metric(key, value, now, step) for key, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def close(self, finished: bool) -> None:
        """See :class:`Logger`."""
        self._client.set_terminated(self._run, "FINISHED" if finished else "FAILED")


# By the key of a recipe that asks for it.
LOGGERS: dict[str, Callable[[Recipe, Path], Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}


class Loggers:
    """All loggers a recipe asks for.

    Args:
        recipe: The run.
        folder: The run directory.
        say: Takes lines for the user.

    Raises:
        UserError: ``extra-missing``, or ``logger-start`` where a program does not begin.
    """

    def __init__(self, recipe: Recipe, folder: Path, say: Callable[[str], None]) -> None:
        self._say = say
        self._loggers: dict[str, Logger] = {}
        for key, kind in LOGGERS.items():
            if getattr(recipe, key):
                try:
                    self._loggers[key] = kind(recipe, folder)
                except ModuleNotFoundError as error:
                    raise missing_extra(error, f"{key}: true") from error
                except Exception as error:  # whatever a server or its client comes up with
                    raise UserError("logger-start", f"{key}: true: {_line(error)}") from error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Hands one line on."""
        for key, logger in list(self._loggers.items()):
            self._careful(key, partial(logger.write, step, values))

    def close(self, finished: bool) -> None:
        """Ends all of them."""
        for key, logger in list(self._loggers.items()):
            self._careful(key, partial(logger.close, finished))
        self._loggers.clear()

    def _careful(self, key: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # whatever a server or its client comes up with
            self._say(f"{key}: {_line(error)}; left out from here on")
            self._loggers.pop(key)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _known_id(folder: Path, key: str) -> str | None:
    path = folder / _IDS
    return json.loads(path.read_text()).get(key) if path.exists() else None


def _note_id(folder: Path, key: str, value: str) -> None:
    path = folder / _IDS
    known = json.loads(path.read_text()) if path.exists() else {}
    write_atomic(path, json.dumps({**known, key: value}) + "\n")
