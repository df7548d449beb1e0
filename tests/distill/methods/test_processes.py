"""The mean of two processes' losses is the loss of one process with both their images."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from detr.models import Detector, Target
from distill.methods import Method
from distill.methods.step import Step

CASES: list[tuple[str, dict[str, object]]] = [
    ("clockdistill", {}),
    ("clockdistill", {"memory": "plain", "general": False, "specific": False}),
    ("kd_detr", {}),
    ("kd_detr", {"class_sum": "normalized"}),
    ("fitnet", {}),
    ("fgd", {}),
    ("qskd", {"threshold": -0.3}),
    ("qskd", {"predictions": "global"}),
    ("d3etr", {}),
    ("detrdistill", {}),
    ("defeat", {}),
    ("od_detr", {}),
    ("foundation", {}),
    *(
        (name, {"mask_weight": 2.0})
        for name in ("clockdistill", "kd_detr", "qskd", "d3etr", "detrdistill", "od_detr")
    ),
]


def again(step: Step) -> Step:
    """The step with its random numbers from the start."""
    return replace(step, generators=[_copied(one) for one in step.generators])


def _copied(generator: torch.Generator) -> torch.Generator:
    copied = torch.Generator()
    copied.set_state(generator.get_state())
    return copied


def one_image(value: Any, image: int, batch: int) -> Any:
    """The part of a step, or of anything in it, that belongs to one image."""
    if isinstance(value, Tensor) and value.ndim and value.shape[0] == batch:
        return value[image : image + 1]
    if isinstance(value, list) and value and isinstance(value[0], Target | torch.Generator):
        return [value[image]]
    if isinstance(value, list):
        return [one_image(v, image, batch) for v in value]
    if isinstance(value, dict):
        return {k: one_image(v, image, batch) for k, v in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: one_image(getattr(value, f.name), image, batch) for f in fields(value)}
        return replace(value, **parts)
    return value


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), CASES)
def test_two_processes_equal_one(
    name: str,
    options: dict[str, object],
    build: Callable[..., Detector],
    take_step: Callable[..., Step],
    method: Callable[..., Method],
    target: Callable[..., Target],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes: dict[str, Any] = {"heads.masks": {"width": 8}} if "mask_weight" in options else {}
    teacher = build(seed=1, **changes).eval().requires_grad_(False)
    student = build(seed=2, **changes).train()
    tested = method(name, student, teacher, **options)
    # The second process has no objects at all; it must not change what the first one does.
    step = take_step(
        student,
        teacher,
        [tested],
        [target([[0.4, 0.5, 0.3, 0.4], [0.6, 0.3, 0.2, 0.2]], [1, 2]), target([], [])],
    )
    whole = tested.losses(again(step))
    assert any(key.endswith("mask") for key in whole) == bool(changes)
    module = sys.modules[type(tested).__module__]
    # The normalizer is the boxes of all processes over their number.
    halves = [
        replace(one_image(step, image, 2), normalizer=step.normalizer / 2) for image in range(2)
    ]
    names = ("mean_over_processes", "shared_statistic")
    sums: list[list[Tensor]] = []
    for half in halves:
        seen: list[Tensor] = []
        for replaced in names:
            monkeypatch.setattr(
                module, replaced, lambda x, s=seen: (s.append(x), x)[1], raising=False
            )
        tested.losses(again(half))
        sums.append(seen)
    assert len(sums[0]) == len(sums[1]), "a process that reduces less often hangs the others"
    found: list[dict[str, Tensor]] = []
    for half in halves:
        means = [torch.stack(pair).mean(0).detach() for pair in zip(*sums, strict=True)]
        for replaced in names:
            monkeypatch.setattr(module, replaced, lambda _, m=means: m.pop(0), raising=False)
        found.append(tested.losses(again(half)))
    for key, value in whole.items():
        mean = (found[0][key] + found[1][key]) / 2
        torch.testing.assert_close(mean, value, rtol=1e-4, atol=1e-6, msg=key)
