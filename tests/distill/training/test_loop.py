"""The run: exact resume, and what happens when something goes wrong."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from detr.errors import UserError
from detr.models import load_model
from distill.cli import main
from distill.recipe import Recipe, load_recipe
from distill.training import loop as train_module
from distill.training.ema import Ema
from distill.training.loop import train
from distill.training.run_dir import RunDir


class Stopped(Exception):
    """Stands for the power supply."""


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a run die when it begins the given step."""
    whole = train_module.train_step

    def stopping(state: Any, batch: Any, index: int) -> dict[str, float]:
        if index == step:
            raise Stopped
        return whole(state, batch, index)

    monkeypatch.setattr(train_module, "train_step", stopping)


@pytest.mark.slow
def test_a_stopped_run_ends_with_the_weights_of_an_unstopped_one(
    tiny: Recipe, tmp_path: Path
) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    train(tiny, straight)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(5, patch)
        with pytest.raises(Stopped):
            train(tiny, stopped)
    train(tiny, stopped)

    ours, theirs = (load_file(run / "model.safetensors") for run in (straight, stopped))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    first, second = (RunDir(run, tiny).load_checkpoint() for run in (straight, stopped))
    assert first is not None and second is not None and first["step"] == second["step"] == 6
    assert all(torch.equal(x, second["student"][name]) for name, x in first["student"].items())
    losses = [
        [row for row in map(json.loads, (run / "metrics.jsonl").open()) if "loss" in row]
        for run in (straight, stopped)
    ]
    assert [row["step"] for row in losses[0]] == [row["step"] for row in losses[1]]


def test_a_run_leaves_a_usable_model_and_repeats_nothing(tiny: Recipe, tmp_path: Path) -> None:
    run = tmp_path / "run"
    model = train(tiny, run)
    detector, info = load_model(run)
    assert info.provenance["step"] == 6 and 0 <= info.provenance["ap"] <= 1
    # The student stands beside its average, measured as well.
    other, theirs = load_model(run / "student.safetensors")
    assert (info.provenance["of"], theirs.provenance["of"]) == ("ema", "student")
    assert info.provenance["ap_student"] == theirs.provenance["ap"]
    assert theirs.provenance["ap_ema"] == info.provenance["ap"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert [k for row in rows for k in row if k.endswith("ap")] == ["ap", "student/ap"]
    assert not torch.equal(detector.source.content.weight, other.source.content.weight)
    saved = torch.load(run / "checkpoints" / "last.pt", weights_only=True)
    for name, weights in (("ema", detector), ("student", other)):
        for key, tensor in weights.state_dict().items():
            assert torch.equal(tensor, saved[name][key]), (name, key)
    assert detector.config.num_classes == len(info.classes) == 7
    assert "number: 12" in (run / "recipe.yaml").read_text()
    assert json.loads((run / "environment.json").read_text())["packages"]["torch"]
    before = model.stat().st_mtime_ns
    train(tiny, run)
    assert model.stat().st_mtime_ns == before
    assert "nothing to do" in (run / "log.txt").read_text()


@pytest.mark.slow
def test_training_lowers_the_loss(tiny: Recipe, tmp_path: Path) -> None:
    update = {"steps": 60, "checkpoint_every": 60}
    longer = Recipe.model_validate(
        {**tiny.model_dump(), **update, "optimizer": {"lr": 3e-3, "backbone_lr": 3e-3, "clip": 1.0}}
    )
    train(longer, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 3 and losses[2] < 0.9 * losses[0]


def test_another_recipe_in_the_same_folder_is_refused(tiny: Recipe, tmp_path: Path) -> None:
    RunDir(tmp_path, tiny)
    frozen = tmp_path / "recipe.yaml"
    frozen.write_text(frozen.read_text().replace("tensorboard: false\n", ""))
    RunDir(tmp_path, tiny)  # made before the key existed: still the same run
    other = tiny.model_copy(update={"batch_size": 3})
    RunDir(tmp_path, other)  # nothing was learned yet, so nothing binds
    RunDir(tmp_path, tiny).append("metrics.jsonl", '{"step": 1}')
    with pytest.raises(UserError, match="batch_size=2, now asked for 3") as caught:
        RunDir(tmp_path, other)
    assert caught.value.code == "run-differs"


def test_two_processes_never_train_in_one_folder(tiny: Recipe, tmp_path: Path) -> None:
    first = RunDir(tmp_path / "run", tiny)
    with first.alone():
        for recipe in (tiny, tiny.model_copy(update={"batch_size": 3})):
            with pytest.raises(UserError) as caught:
                train(recipe, tmp_path / "run")
            assert caught.value.code == "run-busy"
        RunDir(tmp_path / "run", tiny, writes=False)  # the further processes of this training
    assert load_recipe(tmp_path / "run" / "recipe.yaml") == tiny
    with first.alone():
        pass  # let go of


def test_a_loss_that_is_not_finite_names_step_and_files(tiny: Recipe, tmp_path: Path) -> None:
    wild = tiny.optimizer.model_copy(update={"lr": 1e30, "clip": 0.0, "warmup_steps": 0})
    with pytest.raises(UserError) as caught:
        train(tiny.model_copy(update={"optimizer": wild}), tmp_path / "run")
    assert caught.value.code == "loss-not-finite"
    assert "step 1:" in caught.value.message and ".png" in caught.value.message


def test_an_output_folder_that_cannot_be_written(tiny: Recipe, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError) as caught:
        train(tiny, tmp_path / "file" / "run")
    assert caught.value.code == "output-unwritable"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fills_up_leaves_the_earlier_checkpoint_whole(
    tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    run = RunDir(tmp_path, tiny)
    run.save_checkpoint({"step": 3, "x": torch.arange(4)})

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(UserError) as caught:
        run.save_checkpoint({"step": 6, "x": torch.arange(4)})
    assert caught.value.code == "disk-full"
    state = run.load_checkpoint()
    assert state is not None and state["step"] == 3 and state["x"].tolist() == [0, 1, 2, 3]
    assert [path.name for path in run.checkpoint.parent.iterdir()] == ["last.pt"]


class Evil:
    """Runs code when unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("pwned",))


def test_a_checkpoint_with_code_in_it_is_refused(
    tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = RunDir(tmp_path / "run", tiny)
    run.checkpoint.parent.mkdir()
    torch.save({"step": Evil()}, run.checkpoint)
    with pytest.raises(UserError) as caught:
        run.load_checkpoint()
    assert caught.value.code == "checkpoint-pickle"
    assert str(run.checkpoint) in caught.value.message
    assert not (tmp_path / "pwned").exists()


@pytest.mark.slow
def test_distillation_runs_from_a_teacher_of_our_own(
    tiny: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny, tmp_path / "teacher")
    student = Recipe.model_validate(
        {
            **tiny.model_dump(),
            "name": "student",
            "teacher": str(tmp_path / "teacher"),
            "methods": ["clockdistill"],
            "inherit": True,
        }
    )
    train(student, tmp_path / "student")
    rows = [json.loads(line) for line in (tmp_path / "student" / "metrics.jsonl").open()]
    assert any(key.startswith("clockdistill/") for key in rows[0])
    log = (tmp_path / "student" / "log.txt").read_text()
    assert "teacher: AP" in log
    # The terminal gets one line, the log every tensor.
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "inherited" in x]
    assert len(line) < 150 and line in log
    assert "inherited decoder.layers.1.ffn.norm.weight" in log
    assert "inherited backbone.body.conv1.0.weight" in log


def test_training_on_labels_alone_says_what_it_leaves_out(tiny: Recipe, tmp_path: Path) -> None:
    short = tiny.model_copy(update={"steps": 1, "data": tiny.data.model_copy(update={"val": None})})
    (tmp_path / "recipe.yaml").write_text(short.to_yaml())
    command = ["train", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "out")]
    changes = ["--set", "teacher=nowhere", "--set", "methods=[fitnet]", "--set", "inherit=true"]
    done = CliRunner().invoke(main, [*command, *changes])
    assert done.exit_code == 0, done.stderr
    (line,) = [x for x in done.stderr.splitlines() if "left out" in x]
    assert "left out teacher, methods, inherit;" in line and "distill run" in line
    assert "left out" not in CliRunner().invoke(main, command).stderr


def test_the_command_line_tells_mistakes_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("name: x\nsteps: 3\noptimiser: {lr: 1}\n")
    result = CliRunner().invoke(main, ["train", str(path)])
    assert result.exit_code == 2
    assert result.stderr.startswith("error[recipe-key]") and "did you mean 'optimizer'" in (
        result.stderr
    )
    assert result.stderr.count("\n") == 1
    result = CliRunner().invoke(main, ["run", "demo-teacher"])
    assert result.exit_code == 2 and "recipe-not-distillation" in result.stderr


def test_the_command_line_lists_methods_and_recipes() -> None:
    methods = json.loads(CliRunner().invoke(main, ["methods", "--json"]).stdout)
    assert "clockdistill" in methods
    recipes = json.loads(CliRunner().invoke(main, ["recipes", "--json"]).stdout)
    assert {"demo-teacher", "demo-student"} <= recipes.keys()


@pytest.mark.slow
def test_two_processes_train_one_model_and_one_of_them_writes(tiny: Recipe, tmp_path: Path) -> None:
    short = tiny.model_copy(update={"steps": 2, "data": tiny.data.model_copy(update={"val": None})})
    (tmp_path / "recipe.yaml").write_text(short.to_yaml())
    script = tmp_path / "distill_train.py"
    script.write_text(
        "import torch\n"
        "from pathlib import Path\n"
        "import distill.training.loop as t\n"
        "from distill.recipe import load_recipe\n"
        f"here = Path({str(tmp_path)!r})\n"
        "states = []\n"
        "set_up = t.set_up\n"
        "t.set_up = lambda *a: states.append(set_up(*a)) or states[0]\n"
        "t.train(load_recipe(here / 'recipe.yaml'), here / 'run')\n"
        "weights = [p.detach() for p in states[0].parameters]\n"
        "torch.save(weights, here / f'rank{states[0].world.rank}.pt')\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [*command, str(script)], capture_output=True, text=True, env=environment, timeout=120
    )
    assert run.returncode == 0, run.stderr
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    # Each process saw other images, yet the averaged gradients kept the weights the same.
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert {row["step"] for row in rows} == {2}
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_a_running_average_teaches_until_the_rate_drops(
    tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates: list[int] = []
    update = Ema.update

    def noted(self: Ema, model: Any, step: int) -> None:
        updates.append(step)
        update(self, model, step)

    monkeypatch.setattr(Ema, "update", noted)
    online = Recipe.model_validate(
        {
            **tiny.model_dump(),
            "name": "online",
            "methods": ["od_detr"],
            "ema": 0.9,
            "ema_rising": False,
            "ema_evaluated": False,
        }
    )
    train(online, tmp_path / "online")
    assert updates == [0, 1, 2, 3, 4]  # of six steps; the rate drops at step 5
    rows = [json.loads(line) for line in (tmp_path / "online" / "metrics.jsonl").open()]
    assert any(key.startswith("od_detr/auxiliary") for key in rows[0])
    checkpoint = torch.load(tmp_path / "online" / "checkpoints" / "last.pt", weights_only=True)
    saved, _ = load_model(tmp_path / "online")
    name = "decoder.layers.0.cross_attention.value_proj.weight"
    torch.testing.assert_close(saved.state_dict()[name], checkpoint["student"][name])
    assert not torch.equal(checkpoint["ema"][name], checkpoint["student"][name])


def test_an_online_method_asks_for_its_average(tiny: Recipe, tmp_path: Path) -> None:
    settings = {**tiny.model_dump(), "methods": ["od_detr"], "ema": None}
    with pytest.raises(UserError, match="weight average") as caught:
        train(Recipe.model_validate(settings), tmp_path / "run")
    assert caught.value.code == "recipe-value"
    with pytest.raises(ValueError, match="need a teacher"):
        Recipe.model_validate({**settings, "methods": ["od_detr", "fitnet"]})
