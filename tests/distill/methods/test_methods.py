"""How a recipe's ``methods`` become objects, and what the training loop may rely on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from detr.config import Strict
from detr.errors import UserError
from detr.models import Detector
from distill import methods as package
from distill.losses.weights import LossWeights
from distill.methods import METHODS, Method, build_methods, parse_methods
from distill.methods.step import Step
from distill.training.forward import losses_of

Build = Callable[..., Detector]


class Nothing(Strict):
    pass


class OwnLoss(Method[Nothing]):
    """Replaces the detection loss and asks a question after the teacher has spoken."""

    name = "own_loss"
    replaces_detection_loss = True

    def losses(self, step: Step) -> dict[str, Tensor]:
        return {}


class Online(OwnLoss):
    name = "online"
    replaces_detection_loss = False
    teacher = "ema"


def test_methods_of_different_teachers_learn_side_by_side(
    build: Build, take_step: Callable[..., Step]
) -> None:
    """Each sees its own teacher, and what it says then is what it says alone."""
    student, frozen, average = build(), build(seed=1).eval(), build(seed=2).eval()
    specs: list[dict[str, dict[str, object]]] = [
        {"d3etr": {}},
        {"od_detr": {"shared_anchors": False}},
        {"fitnet": {}},
    ]
    together = build_methods(specs, student, frozen, average=average)
    step = take_step(student, frozen, together, average=average)
    losses = losses_of(step, together, LossWeights())

    def alone(specs: list[dict[str, dict[str, object]]], teacher: Detector) -> dict[str, Tensor]:
        methods = build_methods(specs, student, teacher)
        return losses_of(take_step(student, teacher, methods), methods, LossWeights())

    first, second = alone([specs[0], specs[2]], frozen), alone(specs[1:2], average)
    added = {name: value for name, value in first.items() if name.startswith(("d3etr", "fitnet"))}
    assert losses.keys() == second.keys() | added.keys()
    for name, value in losses.items():
        torch.testing.assert_close(value, (second | added)[name])
    torch.stack([*losses.values()]).sum().backward()
    assert all(p.grad is None for model in (frozen, average) for p in model.parameters())


def test_options_are_those_the_base_names() -> None:
    assert OwnLoss.Options is Online.Options is Nothing
    assert Method.Options is Strict
    for kind in METHODS.values():
        assert kind.Options is not Strict and kind.Options.__module__ == kind.__module__


def test_names_options_and_docstrings() -> None:
    for name, kind in METHODS.items():
        assert kind.name == name
        assert set(kind.Options.model_fields) == set(kind.Options().model_dump())
        assert kind.Options.__doc__
        # What `distill methods` prints.
        assert kind.__doc__ and len(kind.__doc__.splitlines()[0]) > 30
        for option in kind.Options.model_fields:
            assert option in kind.Options.__doc__, f"{name}.{option} is not explained"


@pytest.mark.parametrize(
    ("specs", "code", "words"),
    [
        ([{"clokdistill": {}}], "method-unknown", "clockdistill"),
        ([{"zzz": {}}], "method-unknown", "kd_detr"),
        ([{"clockdistill": {"tempratur": 3}}], "method-option", "'temperature'"),
        ([{"clockdistill": {"zzzzz": 3}}], "method-option", "there are mask_weight, memory, alpha"),
        ([{"clockdistill": {"memory": "soft"}}], "method-option", "methods.clockdistill.memory"),
        ([{"kd_detr": {"temperature": 0}}], "method-option", "methods.kd_detr.temperature"),
        ([{"kd_detr": {}}, {"kd_detr": {"general": False}}], "method-twice", "kd_detr"),
    ],
)
def test_mistakes_are_named(
    specs: list[dict[str, dict[str, object]]], code: str, words: str
) -> None:
    with pytest.raises(UserError) as error:
        parse_methods(specs)
    assert error.value.code == code
    assert words in error.value.message


def test_teacher_and_conflicts(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    student = build()
    with pytest.raises(UserError) as error:
        build_methods([{"kd_detr": {}}], student, None)
    assert error.value.code == "method-teacher"

    monkeypatch.setitem(package.METHODS, "own_loss", OwnLoss)
    monkeypatch.setitem(package.METHODS, "second", type("Second", (OwnLoss,), {"name": "second"}))
    with pytest.raises(UserError) as error:
        parse_methods([{"own_loss": {}}, {"second": {}}])
    assert error.value.code == "method-conflict"
    assert len(build_methods([{"kd_detr": {}}, {"own_loss": {}}], student, student)) == 2


def test_methods_are_modules_of_their_own(build: Build) -> None:
    teacher, student = build(), build(width=16)
    clock = build_methods([{"clockdistill": {}}], student, teacher)[0]
    names = set(clock.state_dict())
    # Not a byte of student or teacher: both have their own place in a checkpoint.
    assert names == {
        "adapter.weight",
        "adapter.bias",
        "for_student.content.weight",
        "for_student.content.bias",
        "target_aware.content",
    }
    other = build_methods([{"clockdistill": {}}], student, teacher)[0]
    other.load_state_dict(clock.state_dict())
    torch.testing.assert_close(other.state_dict(), clock.state_dict())
