"""KD-DETR's two variants against loops."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from detr.models import Detector, Target, cxcywh_to_xyxy
from distill.losses.overlap import giou
from distill.methods import Method
from distill.methods.step import Step

Build = Callable[..., Detector]
TakeStep = Callable[..., Step]
MakeMethod = Callable[..., Method]


@torch.no_grad()
def terms(
    step: Step, role: str, their_role: str, ours: int, theirs: int
) -> list[tuple[float, float, float, float]]:
    """(weight, KL summed over classes, L1 summed over coordinates, 1 - GIoU) per query."""
    student, teacher = step.student_outputs[role], step.teacher_outputs[their_role]
    found = []
    for image in range(len(step.targets)):
        for query in range(student.logits[0].shape[1]):
            z_s, z_t = student.logits[ours][image, query], teacher.logits[theirs][image, query]
            b_s, b_t = student.boxes[ours][image, query], teacher.boxes[theirs][image, query]
            p, q = (z_t / 10).softmax(-1), (z_s / 10).softmax(-1)
            found.append(
                (
                    float(z_t.sigmoid().max()),
                    100 * float((p * (p / q).log()).sum()),
                    float((b_s - b_t).abs().sum()),
                    1 - float(giou(cxcywh_to_xyxy(b_s), cxcywh_to_xyxy(b_t))),
                )
            )
    return found


@pytest.mark.parametrize("part", ["general", "specific"])
def test_official_variant(
    part: str, student: Detector, teacher: Detector, take_step: TakeStep, method: MakeMethod
) -> None:
    kd = method("kd_detr", student, teacher, general_points=5)
    step = take_step(student, teacher, [kd])
    losses = kd.losses(step)
    role = f"kd_detr/{part}"
    kl = l1 = overlap = 0.0
    for layer in range(2):
        rows = terms(step, role, "own" if part == "specific" else role, layer, 1)
        weight = sum(row[0] for row in rows)
        # Mean over 3 classes, sum over queries of the 8 images of a batch (here 2).
        kl += sum(w * k / 3 for w, k, _, _ in rows) * 8 / 2
        l1 += 5 * sum(w * d / 4 for w, _, d, _ in rows) / weight
        overlap += 2 * sum(w * g for w, _, _, g in rows) / weight
    assert losses[f"{role}_class"].item() == pytest.approx(kl, rel=2e-3)
    assert losses[f"{role}_l1"].item() == pytest.approx(l1, rel=1e-4)
    assert losses[f"{role}_giou"].item() == pytest.approx(overlap, rel=1e-4)


def test_paired_and_normalized_variant(
    student: Detector, teacher: Detector, take_step: TakeStep, method: MakeMethod
) -> None:
    options = {"layers": "paired", "class_sum": "normalized", "specific": False}
    kd = method("kd_detr", student, teacher, **options)
    step = take_step(student, teacher, [kd])
    assert "kd_detr/specific" not in step.student_outputs
    assert step.student_outputs["kd_detr/general"].logits[0].shape[1] == 7  # the teacher's queries
    expected = 0.0
    for layer in range(2):
        rows = terms(step, "kd_detr/general", "kd_detr/general", layer, layer)
        expected += sum(w * k for w, k, _, _ in rows) / sum(row[0] for row in rows)
    losses = kd.losses(step)
    assert len(losses) == 3
    assert float(losses["kd_detr/general_class"]) == pytest.approx(expected, rel=2e-3)


def test_an_equal_student_has_nothing_to_learn_from_paired_layers(
    build: Build, take_step: TakeStep, method: MakeMethod
) -> None:
    teacher = build(seed=4).eval()
    student = copy.deepcopy(teacher)
    kd = method("kd_detr", student, teacher, layers="paired")
    for name, value in kd.losses(take_step(student, teacher, [kd])).items():
        assert abs(value.item()) < 1e-5, name


def test_class_weight_does_not_depend_on_the_batch_size(
    build: Build, take_step: TakeStep, method: MakeMethod, target: Callable[..., Target]
) -> None:
    teacher, student = build(seed=1).eval(), build(seed=2).eval()
    kd = method("kd_detr", student, teacher, general=False)
    one = target([[0.5, 0.5, 0.2, 0.2]], [0])
    step = take_step(student, teacher, [kd], [one])
    single = kd.losses(step)
    for outputs in (step.student_outputs["kd_detr/specific"], step.teacher_outputs["own"]):
        outputs.logits = [torch.cat((x, x)) for x in outputs.logits]
        outputs.boxes = [torch.cat((x, x)) for x in outputs.boxes]
    for name, value in kd.losses(step).items():
        torch.testing.assert_close(value, single[name])


def test_gradients_reach_the_student_only(
    student: Detector,
    build: Build,
    take_step: TakeStep,
    method: MakeMethod,
    target: Callable[..., Target],
) -> None:
    teacher = build(seed=1).eval()
    kd = method("kd_detr", student, teacher)
    for targets in (None, [target([], [])] * 2):
        student.zero_grad()
        losses = kd.losses(take_step(student, teacher, [kd], targets))
        assert len(losses) == 6 and all(v.isfinite() for v in losses.values())
        torch.stack(list(losses.values())).sum().backward()
        assert all(p.grad is None for p in teacher.parameters())
        assert any(
            p.grad is not None and p.grad.any()
            for n, p in student.named_parameters()
            if n.startswith("decoder.layers.0")
        )


def test_both_papers_at_once(
    student: Detector, teacher: Detector, take_step: TakeStep, method: MakeMethod
) -> None:
    both = [method(name, student, teacher) for name in ("kd_detr", "clockdistill")]
    step = take_step(student, teacher, both)
    keys = [key for part in both for key in part.losses(step)]
    assert len(keys) == len(set(keys)) == 10
