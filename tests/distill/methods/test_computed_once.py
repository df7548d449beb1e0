"""Nothing a method needs of a step is computed twice."""

from __future__ import annotations

import gc
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from detr.models import Detector
from distill.losses import costs, linear_assignment
from distill.methods import METHODS, Method, detrdistill
from distill.methods.parts import masks
from distill.methods.step import PerStep, Step

TakeStep = Callable[..., Step]
MakeMethod = Callable[..., Method[Any]]

# Options under which more of a method needs the teacher's assignment than by default.
MORE: list[tuple[str, dict[str, Any]]] = [
    ("od_detr", {"cost_of": "teacher"}),
    ("od_detr", {"matching_layers": "final"}),
    ("qskd", {"layers": "last"}),
    ("d3etr", {"constraint": "all"}),
]


def digest(*tensors: Tensor) -> bytes:
    return b"".join(x.detach().contiguous().numpy().tobytes() for x in tensors)


def watch(
    function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, note: Callable[..., None]
) -> None:
    """Calls ``note`` with the arguments of every call, whichever module calls the function."""

    def watched(*args: Any, **options: Any) -> Any:
        note(*args, **options)
        return function(*args, **options)

    for name, module in list(sys.modules.items()):
        if name.startswith("distill.") and vars(module).get(function.__name__) is function:
            monkeypatch.setattr(module, function.__name__, watched)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in METHODS), *MORE])
def test_every_assignment_and_mask_is_made_once(
    name: str,
    options: dict[str, Any],
    student: Detector,
    teacher: Detector,
    take_step: TakeStep,
    method: MakeMethod,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compared, assigned, masked = Counter[bytes](), Counter[bytes](), []

    def note_terms(logits: Tensor, boxes: Tensor, *_: Any, **__: Any) -> None:
        compared.update(digest(x, y) for x, y in zip(logits, boxes, strict=True))

    def note_problems(table: Tensor, *_: Any, **__: Any) -> None:
        assigned.update(digest(x) for x in table)

    watch(costs.pair_terms, monkeypatch, note_terms)
    watch(linear_assignment.assign, monkeypatch, note_problems)
    watch(masks.scale_masks, monkeypatch, lambda *_: masked.append(1))
    tested = method(name, student, teacher, **options)
    step = take_step(student, None if tested.teacher == "none" else teacher, [tested])
    assert (tested.detection_losses(step) or {}) | tested.losses(step)
    assert max(compared.values(), default=1) == 1
    assert max(assigned.values(), default=1) == 1
    assert len(masked) <= 1


def test_further_fixed_groups_share_the_teachers_assignment(
    student: Detector,
    teacher: Detector,
    take_step: TakeStep,
    method: MakeMethod,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    d3 = method("d3etr", student, teacher, fixed=2)
    step = take_step(student, teacher, [d3])
    output, calls = step.teacher_outputs["own"], Counter[bytes]()
    watch(costs.pair_terms, monkeypatch, lambda x, y, *_, **__: calls.update([digest(x[-1])]))
    assert "d3etr/fixed2_gt_l1" in d3.losses(step)
    assert calls[digest(output.logits[-1])] == 1


def test_detrdistill_weighs_a_layers_queries_once_for_all_levels(
    student: Detector,
    teacher: Detector,
    take_step: TakeStep,
    method: MakeMethod,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers: list[int] = []
    watch(detrdistill.good_queries, monkeypatch, lambda output, layer, *_: layers.append(layer))
    tested = method("detrdistill", student, teacher, logits=False, prior=False)
    tested.losses(take_step(student, teacher, [tested]))
    assert layers == [0, 1]


@pytest.mark.slow
def test_what_was_computed_lives_as_long_as_the_step(
    student: Detector, take_step: TakeStep
) -> None:
    made: list[int] = []

    def compute(step: Step) -> Sequence[Tensor]:
        made.append(step.index)
        return [step.images.clone()]

    value = PerStep(compute)
    first, second = (take_step(student, None, [], index=i) for i in (0, 1))
    assert value(first) is value(first) and value(second) is not value(first)
    assert made == [0, 1]
    tensor = weakref.ref(value(first)[0])
    del first
    gc.collect()
    assert tensor() is None and isinstance(value(second)[0], torch.Tensor)
