"""A training step on a device that is not there: nothing mixed, and how often it is waited for.

What a step waits for is time in which the GPU has nothing to do. The table is what each method may
cost in it; a step without any is the first line.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from virtual_device import DEVICE, MixedDevices, Waits, watched

from detr.config import ClassMap
from detr.models import Detector, Target
from distill.data.batches import Batch
from distill.distributed import World
from distill.methods import METHODS, build_methods
from distill.recipe import Recipe
from distill.training.ema import Ema
from distill.training.loop import train_step
from distill.training.state import State

# Costs of matching come to the CPU once for the own queries and once for the encoder's, and the
# losses of the step once. What a method adds are its own matchings, and choices that have as many
# results as there are queries of a kind.
PLAIN = {"read": 3}
BUDGET: dict[str, dict[str, int]] = {
    "none": PLAIN,
    "clockdistill": PLAIN,
    "kd_detr": PLAIN,
    "d3etr": {"read": 6, "shape": 2},
    "defeat": PLAIN,
    "detrdistill": {"read": 6, "shape": 3},
    "fitnet": PLAIN,
    "fgd": PLAIN,
    "foundation": PLAIN,
    # Layers' matches are counted one by one, and their union taken.
    "go_lsd": {"read": 7, "shape": 5},
    "go_lsd_teacher": {"read": 7, "shape": 4},
    "mgd": PLAIN,
    "od_detr": {"read": 6, "shape": 4},
    "qskd": {"read": 12, "shape": 10},
    "stable_dino": PLAIN,
}


def state_of(recipe: Recipe, student: Detector, teacher: Detector, name: str) -> State:
    """A run's state on the device, without data."""
    kind = METHODS.get(name)
    average = Ema(student, 0.9) if kind is not None and kind.teacher == "ema" else None
    student, teacher = student.to(DEVICE), teacher.to(DEVICE)
    if average is not None:
        average.model = average.model.to(DEVICE)
    methods = build_methods(
        [] if kind is None else [{name: {}}], student, teacher if average is None else average.model
    )
    parameters = [p for m in (student, *methods) for p in m.parameters() if p.requires_grad]
    group = {"params": parameters, "base_lr": 1e-3}
    return State(
        recipe=recipe,
        world=World(0, 1, DEVICE),
        classes=ClassMap(names=("a", "b", "c"), category_ids=(1, 2, 3)),
        student=student.train(),
        teacher=teacher if kind is not None and kind.teacher == "frozen" else None,
        methods=methods,
        # AdamW's one kernel for all parameters asks for devices it knows.
        optimizer=torch.optim.SGD([group], 1e-3, foreach=False),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        ema=average,
        batches=SimpleNamespace(slots=range(2)),  # type: ignore[arg-type]
        val=None,
    )


def batch_of(target: Callable[..., Target]) -> Batch:
    """Two images, the second of which leaves padding."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 64, 96, generator=generator)
    targets = [
        target([[0.3, 0.4, 0.2, 0.3], [0.7, 0.5, 0.4, 0.6]], [0, 2]),
        target([[0.5, 0.5, 0.5, 0.25]], [1]),
    ]
    return Batch(
        images, torch.tensor([[64.0, 96.0], [40.0, 80.0]]), targets, [(Path("a.png"),)] * 2
    )


def waits_of(
    name: str, recipe: Recipe, student: Detector, teacher: Detector, target: Callable[..., Target]
) -> Waits:
    """Of a step after the first, which makes what is kept."""
    with watched():
        state = state_of(recipe, student, teacher, name)
        train_step(state, batch_of(target), 0)
    with watched() as waits:
        values = train_step(state, batch_of(target), 1)
    assert values["loss"] > 0
    return waits


@pytest.mark.slow
@pytest.mark.parametrize("name", ["none", *METHODS])
def test_a_step_waits_no_more_than_its_budget(
    name: str,
    tiny: Recipe,
    student: Detector,
    teacher: Detector,
    target: Callable[..., Target],
) -> None:
    waits = waits_of(name, tiny, student, teacher, target)
    assert waits.counts() == BUDGET[name], waits.text()


def test_what_a_gpu_refuses_is_refused() -> None:
    with watched():
        there = torch.ones(2, 3, device=DEVICE)
        with pytest.raises(MixedDevices, match="add: tensors of two devices"):
            there + torch.ones(2, 3)
        with pytest.raises(MixedDevices, match="cat: tensors of two devices"):
            torch.cat([there[0], torch.ones(3)])
        with pytest.raises(MixedDevices, match="a generator of the CPU"):
            torch.rand(3, device=DEVICE, generator=torch.Generator())
        with pytest.raises(MixedDevices, match="the device's index"):
            torch.ones(3)[there[0].long()]
        assert (there * torch.tensor(2.0)).sum().item() == 12, "a number of the CPU will do"


@pytest.mark.parametrize(
    ("work", "waits"),
    [
        (lambda x: x.sum().item(), {"read": 1}),
        (lambda x: x.tolist(), {"read": 1}),
        (lambda x: bool((x > 0).any()), {"read": 1}),
        (lambda x: x.cpu(), {"read": 1}),
        (lambda x: torch.zeros(4).copy_(x), {"read": 1}),
        (lambda x: x[x > 1], {"shape": 1}),
        (lambda x: (x > 1).nonzero(), {"shape": 1}),
        (lambda x: x.masked_select(x > 1), {"shape": 1}),
        (lambda x: torch.unique(x), {"shape": 1}),
        (lambda x: x[[0, 2]], {"upload": 1}),
        (lambda x: x[torch.tensor([0, 2])], {"upload": 1}),
        (lambda x: x + torch.tensor([1.0, 2.0, 3.0, 4.0], device=DEVICE), {"upload": 1}),
        (lambda x: x.new_tensor([1.0]), {"upload": 1}),
        (lambda x: torch.ones(4).to(DEVICE), {"upload": 1}),
        (lambda x: torch.ones(4).to(DEVICE, non_blocking=True), {}),
        (lambda x: torch.full((), 3.0, device=DEVICE) * x, {}),
        (lambda x: x.masked_fill(x > 1, 0).topk(2).values[0], {}),
        (lambda x: x.__setitem__(x > 1, 0), {}),
        (lambda x: x[x.argsort()], {}),
    ],
)
def test_what_is_waited_for_is_noted(
    work: Callable[[Tensor], object], waits: dict[str, int]
) -> None:
    with watched():
        there = torch.arange(4.0).to(DEVICE)
    with watched() as noted:
        work(there)
    assert noted.counts() == waits
