"""What a run records reaches the programs people watch, and none of them costs a run.

The protocol is tested with a program that is made up, and with the programs themselves.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from detr.errors import UserError
from distill.recipe import Recipe
from distill.training import loggers
from distill.training.loop import train
from distill.training.run_dir import RunDir


def asked(tiny: Recipe, key: str, **changes: Any) -> Recipe:
    whole = {**tiny.model_dump(), key: True, "steps": 2, **changes}
    return Recipe.model_validate({**whole, "data": {**whole["data"], "val": None}})


def recorded(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What ``metrics.jsonl`` holds, by key."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in map(json.loads, (run / "metrics.jsonl").open()):
        for key, value in row.items():
            if key != "step":
                found.setdefault(key, []).append((row["step"], value))
    return found


class Noted:
    """A program that is made up."""

    made: list[Noted] = []

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.finished: bool | None = None
        self.made.append(self)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.rows.append((step, dict(values)))

    def close(self, finished: bool) -> None:
        self.finished = finished


class Refusing(Noted):
    def __init__(self, recipe: Recipe, folder: Path) -> None:
        raise RuntimeError("no account")


class Failing(Noted):
    def write(self, step: int, values: Mapping[str, float]) -> None:
        raise ConnectionError("server is gone\nfor good")


@pytest.fixture(autouse=True)
def made(monkeypatch: pytest.MonkeyPatch) -> list[Noted]:
    monkeypatch.setattr(Noted, "made", [])
    return Noted.made


def test_a_logger_gets_what_the_metrics_hold(
    tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(loggers.LOGGERS, "wandb", Noted)
    train(asked(tiny, "wandb"), tmp_path / "run")
    (logger,) = Noted.made
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert [{"step": step, **values} for step, values in logger.rows] == rows
    assert logger.finished is True
    train(asked(tiny, "wandb"), tmp_path / "run")  # nothing to do, nothing to tell
    assert len(Noted.made) == 1


def test_one_that_fails_is_left_out_and_the_training_goes_on(
    tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(loggers.LOGGERS, "mlflow", Failing)
    train(asked(tiny, "mlflow"), tmp_path / "run")
    log = (tmp_path / "run/log.txt").read_text()
    assert log.count("mlflow: ConnectionError: server is gone for good; left out") == 1
    assert "finished, 2 steps" in log


def test_one_that_does_not_begin_is_told_before_the_first_step(
    tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(loggers.LOGGERS, "wandb", Refusing)
    with pytest.raises(UserError, match="wandb: true: RuntimeError: no account") as caught:
        train(asked(tiny, "wandb"), tmp_path / "run")
    assert caught.value.code == "logger-start"
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_run_that_dies_is_told(
    tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(loggers.LOGGERS, "wandb", Noted)
    wild = {**tiny.optimizer.model_dump(), "lr": 1e30, "clip": 0, "warmup_steps": 0}
    with pytest.raises(UserError, match="lower"):
        train(asked(tiny, "wandb", optimizer=wild), tmp_path / "run")
    assert Noted.made[0].finished is False


@pytest.mark.parametrize(
    ("key", "module"), [("wandb", "wandb"), ("mlflow", "mlflow"), ("tensorboard", "tensorboard")]
)
def test_a_missing_program_names_its_extra(
    tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, module: str
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)

    class Missing:
        def find_spec(self, name: str, *_: Any) -> None:
            if name.split(".")[0] == module:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    run = RunDir(tmp_path / "run", asked(tiny, key))
    with pytest.raises(UserError, match=rf"{key}: true needs .*\[{key}\]") as caught, run.logging():
        pass
    assert caught.value.code == "extra-missing"


@pytest.mark.slow
def test_tensorboard(tiny: Recipe, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(asked(tiny, "tensorboard"), tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    wanted = recorded(tmp_path / "run")
    assert set(events.Tags()["scalars"]) == set(wanted)
    (loss,) = events.Scalars("loss")
    assert (loss.step, pytest.approx(loss.value, rel=1e-5)) == wanted["loss"][0]


@pytest.mark.slow
def test_mlflow_and_its_file_store(
    tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # releases that would rather have SQL
    mlflow.set_tracking_uri(None)
    run = tmp_path / "run"
    train(asked(tiny, "mlflow"), run)
    train(asked(tiny, "mlflow", steps=3), run)  # goes on, in the same run
    client = mlflow.MlflowClient()
    (found,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert found.info.status == "FINISHED" and found.info.run_name == "tiny"
    assert found.info.run_id == json.loads((run / "loggers.json").read_text())["mlflow"]
    history = client.get_metric_history(found.info.run_id, "loss")
    wanted = recorded(run)["loss"]
    assert [(m.step, m.value) for m in history] == wanted and len(wanted) == 2
    assert [a.path for a in client.list_artifacts(found.info.run_id)] == ["recipe.yaml"]


@pytest.mark.slow
def test_wandb_offline(tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = tmp_path / "run"
    train(asked(tiny, "wandb"), run)
    train(asked(tiny, "wandb", steps=3), run)
    own = json.loads((run / "loggers.json").read_text())["wandb"]
    files = sorted((run / "wandb").glob(f"offline-run-*-{own}/run-{own}.wandb"))
    assert len(files) == 2  # two parts of one run
    content = b"".join(file.read_bytes() for file in files)
    assert b"grad_norm" in content and b"peak_mb" in content
