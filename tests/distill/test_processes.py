"""Two processes under torchrun compute what one process with all their images computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from detr.config import merged
from detr.errors import UserError
from distill.distributed import World, join
from distill.methods import METHODS
from distill.recipe import Recipe
from distill.training.loop import train, train_step
from distill.training.run_dir import RunDir
from distill.training.state import set_up

STEPS = 2
# Batch norm's statistics differ between processes by nature; frozen ones, here of random weights,
# do not.
FROZEN_NORM = mock.patch("distill.training.state.check_norm")

# Nothing here may look at a whole process: no statistics of a batch, no dropout.
EXACT = {"dropout": 0.0, "width": 32, "attention_heads": 4}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "detr": {
        "neck": {"levels": 1, "group_norm": False},
        "encoder": {"kind": "dense", "layers": 1, "ffn": 32},
        "queries": {
            "kind": "learned", "number": 12, "reference": "center", "learned_content": False,
        },
        "decoder": {"cross_attention": {"kind": "dense"}, "refinement": {"kind": "none"}},
        "heads": {"classes": {"kind": "softmax"}},
    },
    "dab": {
        "neck": {"levels": 1, "group_norm": False},
        "encoder": {"kind": "dense", "layers": 1, "ffn": 32, "scaled_positions": True},
        "queries": {
            "kind": "anchors", "number": 12, "learned_content": False, "denoising": {"groups": 3},
        },
        "decoder": {
            "cross_attention": {"kind": "conditional"}, "refinement": {"shared_heads": True},
        },
    },
    "h": {
        "queries": {
            "kind": "two_stage", "number": 12, "learned_content": True,
            "one_to_many": {"queries": 6, "repeat": 2},
        },
        "decoder": {"final_norm": False},
    },
}  # fmt: skip
# Options under which a method draws numbers or divides by other sums than with its defaults.
FURTHER: list[dict[str, dict[str, Any]]] = [
    {"clockdistill": {"jitter": 0.4, "memory": "plain"}},
    {"kd_detr": {"class_sum": "normalized"}},
    {"qskd": {"predictions": "global", "adaptor_layers": 1}},
    {"d3etr": {"adaptive": 2, "fixed": 2, "heads": "mean"}},
    {"mgd": {"on": "backbone"}},
]


def cases() -> dict[str, dict[str, Any]]:
    """Recipe changes by name: every method, then other options and detectors."""
    found: dict[str, dict[str, Any]] = {
        name: {"methods": [{name: {}}]}
        for name in METHODS
        # Which need a detector with distributions, or weights that nobody brings.
        if not name.startswith(("go_lsd", "foundation"))
    }
    for spec in FURTHER:
        found[f"{next(iter(spec))}, further options"] = {"methods": [spec]}
    for name, changes in ARCHITECTURES.items():
        found[name] = {"detector": changes}
    return found


def recipe_of(recipe: Recipe, changes: dict[str, Any], batch: int, teacher: Path) -> Recipe:
    """A short exact run; ``batch`` images in every step."""
    content = recipe.model_dump(mode="json")
    content["data"]["val"] = None
    content["detector"] |= EXACT
    content["detector"]["backbone"] |= {"strides": [8, 16]}
    # Batch norm would see other images in every process.
    content["detector"]["backbone"]["options"] |= {"norm_layer": "layernorm2d"}
    content["detector"] = merged(content["detector"], changes.get("detector", {}))
    if content["detector"]["neck"]["levels"] == 1:
        content["detector"]["backbone"]["strides"] = [16]
    content |= {"steps": STEPS, "batch_size": batch, "methods": changes.get("methods", [])}
    # The optimizer divides gradients by their size and so makes much of rounding; gradients are
    # compared themselves, and the weights stay where they are.
    content["optimizer"] |= {"lr": 1e-12, "backbone_lr": 1e-12, "clip": 0.0}
    if content["methods"]:
        content["teacher"] = str(teacher)
    return Recipe.model_validate(content)


def outcome(recipe: Recipe, world: World, folder: Path) -> dict[str, Any]:
    """Losses and gradients of all steps.

    In the second step the second half of the images has no objects.
    """
    with FROZEN_NORM:
        state = set_up(recipe, RunDir(folder, recipe, world.main), world)
    count = recipe.batch_size
    found: dict[str, Any] = {"losses": [], "gradients": []}
    for index in range(STEPS):
        batch = state.batches.batch(index)
        if index == 1:
            for slot, target in zip(state.batches.slots, batch.targets, strict=True):
                if slot >= count // 2:
                    target.boxes, target.labels = target.boxes[:0], target.labels[:0]
        found["losses"].append(train_step(state, batch, index))
        found["gradients"].append(
            {
                f"{i}.{name}": parameter.grad.clone()
                for i, module in enumerate(state.trained)
                for name, parameter in module.named_parameters()
                if parameter.grad is not None
            }
        )
    return found


def main(folder: str) -> None:
    """What each of two processes does."""
    here, world = Path(folder), join()
    content = Recipe.model_validate_json((here / "recipe.json").read_text())
    found = {}
    for name, changes in cases().items():
        recipe = recipe_of(content, changes, 4, here / "teacher")
        found[name] = outcome(recipe, world, here / f"two-{name}")
    torch.save(found, here / f"rank{world.rank}.pt")


def train_teacher(tiny: Recipe, tmp_path: Path) -> None:
    """The teacher of all cases, ``teacher`` in a folder."""
    teacher = recipe_of(tiny, {}, 4, tmp_path)
    # Far from its start, where boxes are their references, as the student's are: the sign of a
    # difference that is all rounding would be the gradient of its size.
    rates = teacher.optimizer.model_copy(update={"lr": 1e-2, "backbone_lr": 1e-2})
    changes = {"steps": 1, "seed": 7, "optimizer": rates}
    with FROZEN_NORM:
        train(teacher.model_copy(update=changes), tmp_path / "teacher")


def torchrun(*arguments: object) -> None:
    """Runs this file in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [*command, __file__, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-4000:]


@pytest.mark.slow
def test_two_processes_equal_one_with_all_images(tiny: Recipe, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(tiny.model_dump_json())
    train_teacher(tiny, tmp_path)
    torchrun(tmp_path)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    for name, changes in cases().items():
        recipe = recipe_of(tiny, changes, 4, tmp_path / "teacher")
        alone = outcome(recipe, join(), tmp_path / f"one-{name}")
        for index in range(STEPS):
            ours, theirs = alone["losses"][index], first[name]["losses"][index]
            assert theirs == second[name]["losses"][index]
            assert len(ours) > 3
            assert theirs == pytest.approx(ours, rel=1e-4, abs=1e-6), (name, index)
            for parameter, gradient in alone["gradients"][index].items():
                difference = first[name]["gradients"][index][parameter] - gradient
                share = float(difference.norm() / gradient.norm().clamp(min=1e-4))
                assert share < 0.01, (name, index, parameter)


LONG = 10
# DETR's softmax, whose divisor depends on the matches, and methods with sums of their own.
LONG_CASES: dict[str, dict[str, Any]] = {
    "detr": {"detector": ARCHITECTURES["detr"]},
    "clockdistill": {"methods": [{"clockdistill": {}}]},
    "kd_detr": {"methods": [{"kd_detr": {"class_sum": "normalized"}}]},
    "detrdistill": {"methods": [{"detrdistill": {}}]},
}


def long_losses(tiny: Recipe, name: str, accumulate: int, world: World, folder: Path) -> Any:
    """The losses of ten steps that move the weights."""
    content = recipe_of(tiny, LONG_CASES[name], 4, folder / "teacher").model_dump(mode="json")
    content |= {"steps": LONG, "accumulate": accumulate, "ema": None}
    content["optimizer"] |= {"lr": 1e-4, "backbone_lr": 1e-4, "clip": 0.1}
    recipe = Recipe.model_validate(content)
    with FROZEN_NORM:
        run = RunDir(folder / f"long-{name}-{world.size}-{accumulate}", recipe, world.main)
        state = set_up(recipe, run, world)
    steps = [train_step(state, state.batches.batch(i), i) for i in range(LONG)]
    # The norm of the gradients is no loss, and one number for what rounding does to all of them.
    return [{k: v for k, v in values.items() if k != "grad_norm"} for values in steps]


def long_main(folder: str) -> None:
    """What each of two processes does, with two images each."""
    here, world = Path(folder), join()
    tiny = Recipe.model_validate_json((here / "recipe.json").read_text())
    found = {name: long_losses(tiny, name, 1, world, here) for name in LONG_CASES}
    (here / f"long{world.rank}.json").write_text(json.dumps(found))


@pytest.mark.slow
def test_parts_and_processes_mean_the_same_training(tiny: Recipe, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(tiny.model_dump_json())
    train_teacher(tiny, tmp_path)
    torchrun(tmp_path, "long")
    two = json.loads((tmp_path / "long0.json").read_text())
    for name in LONG_CASES:
        whole = long_losses(tiny, name, 1, join(), tmp_path)
        parts = long_losses(tiny, name, 4, join(), tmp_path)
        for index in range(LONG):
            for other in (two[name][index], parts[index]):
                assert other == pytest.approx(whole[index], rel=1e-4, abs=1e-5), (name, index)
        assert whole[-1]["loss"] < whole[0]["loss"]


def test_averaged_gradients_lie_in_memory_as_the_weights_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.mul_(2))  # two that are equal
    kernel = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    kernel(torch.randn(1, 3, 8, 8)).square().sum().backward()
    assert kernel.weight.grad is not None
    before = kernel.weight.grad.clone()
    World(0, 2, torch.device("cpu")).average_gradients([kernel])
    torch.testing.assert_close(kernel.weight.grad, before)
    assert kernel.weight.grad.stride() == kernel.weight.stride() != (27, 9, 3, 1)


def test_what_cannot_be_shared_is_told(tiny: Recipe, tmp_path: Path) -> None:
    odd = tiny.model_copy(update={"batch_size": 3, "accumulate": 2})
    with pytest.raises(UserError, match=r"3 images .* 1 processes x accumulate 2") as error:
        train(odd, tmp_path / "odd")
    assert error.value.code == "batch-split"
    adaptor = recipe_of(tiny, {"methods": [{"qskd": {"adaptor_layers": 1}}]}, 2, tmp_path / "t")
    with FROZEN_NORM:
        train(recipe_of(tiny, {}, 2, tmp_path).model_copy(update={"steps": 1}), tmp_path / "t")
        with pytest.raises(UserError, match="statistics of the whole batch") as error:
            train(adaptor.model_copy(update={"accumulate": 2}), tmp_path / "adaptor")
    assert error.value.code == "accumulate-statistic"


if __name__ == "__main__":
    (long_main if sys.argv[2:] == ["long"] else main)(sys.argv[1])
