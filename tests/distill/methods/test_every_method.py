"""What every method promises: who gets gradients, what equal models cost, empty images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from detr.models import Detector, Target
from distill.methods import METHODS, Method
from distill.methods.step import Step

Targets = Callable[..., Target]

# Losses that vanish where the student is the teacher, by method. The rest learns the ground truth
# (D3ETR's and DETRDistill's further groups, OD-DETR, Stable-DINO), is an entropy that no student
# makes zero, or goes through modules of the method that start at random (MGD).
ZERO: dict[str, tuple[str, ...]] = {
    "clockdistill": ("memory", "class", "l1", "giou"),
    "kd_detr": ("general_class", "general_l1", "general_giou", "specific_class", "specific_l1"),
    "d3etr": ("own_l1", "own_giou", "own_self", "own_cross", "fixed1_l1", "fixed1_cross"),
    "detrdistill": ("l1", "giou", "features"),
    "fitnet": ("features",),
    "foundation": (),  # its teacher is no detector
    # Its layers differ whoever the teacher is; the teacher's variant follows the last of them.
    "go_lsd": (),
    "go_lsd_teacher": (),
    "fgd": ("foreground", "background", "attention", "relation"),
    "qskd": ("features", "l1", "giou"),
    "od_detr": ("prediction_l1", "prediction_giou"),
    "defeat": ("foreground", "background"),
    "mgd": (),
    "stable_dino": (),
}
# Option values under which everything a method has takes part in a step this small.
OPTIONS: dict[str, dict[str, Any]] = {
    "qskd": {"threshold": -0.9},
    "kd_detr": {"layers": "paired"},  # by default every layer follows the teacher's last
}


def all_losses(tested: Method, step: Step) -> dict[str, Tensor]:
    return (tested.detection_losses(step) or {}) | tested.losses(step)


def make(name: str, student: Detector, teacher: Detector, method: Callable[..., Method]) -> Method:
    return method(name, student, teacher, **OPTIONS.get(name, {}))


@pytest.mark.parametrize("name", METHODS)
def test_only_the_student_and_the_methods_modules_learn(
    name: str,
    student: Detector,
    teacher: Detector,
    take_step: Callable[..., Step],
    method: Callable[..., Method],
) -> None:
    # Gradients of the teacher would be noticed, had it any.
    teacher.requires_grad_(True)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    tested = make(name, student, teacher, method)
    with_teacher = None if tested.teacher == "none" else teacher
    step = take_step(student, with_teacher, [tested])
    losses = all_losses(tested, step)
    assert losses
    for key, value in losses.items():
        assert value.ndim == 0 and value.isfinite() and value >= -1e-6, key
        assert value.requires_grad, f"{key} teaches nobody"
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())
    for key, parameter in tested.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), key
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


@pytest.mark.parametrize("name", METHODS)
def test_a_student_that_is_the_teacher_has_nothing_to_learn(
    name: str,
    teacher: Detector,
    take_step: Callable[..., Step],
    method: Callable[..., Method],
) -> None:
    tested = make(name, teacher, teacher, method)
    step = take_step(teacher, teacher, [tested])
    losses = tested.losses(step)
    for part in ZERO[name]:
        assert float(losses[f"{name}/{part}"]) == pytest.approx(0, abs=2e-5), part


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("empty", [2, 1])
def test_images_without_objects(
    name: str,
    empty: int,
    student: Detector,
    teacher: Detector,
    take_step: Callable[..., Step],
    method: Callable[..., Method],
    target: Targets,
) -> None:
    truth = [target([], []) for _ in range(empty)]
    truth += [target([[0.5, 0.4, 0.3, 0.6]], [2])] * (2 - empty)
    tested = make(name, student, teacher, method)
    with_teacher = None if tested.teacher == "none" else teacher
    step = take_step(student, with_teacher, [tested], truth)
    losses = all_losses(tested, step)
    assert all(value.isfinite() for value in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    for parameter in (*student.parameters(), *tested.parameters()):
        assert parameter.grad is None or parameter.grad.isfinite().all()
