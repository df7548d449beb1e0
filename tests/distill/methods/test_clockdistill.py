"""CLoCKDistill against its equations, written out in loops."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from detr.errors import UserError
from detr.models import Detector, Target, cxcywh_to_xyxy
from distill.losses.overlap import giou
from distill.methods import Method
from distill.methods.parts.masks import scale_masks
from distill.methods.step import Step

Build = Callable[..., Detector]
TakeStep = Callable[..., Step]
MakeMethod = Callable[..., Method]
Targets = Callable[..., Target]

EVERYTHING_OFF = {"memory": "off", "target_aware": False, "general": False, "specific": False}


@torch.no_grad()
def equation_9(
    step: Step, parts: dict[str, str], pairs: list[tuple[int, int]], printed: bool = False
) -> dict[str, float]:
    """Equation 9 query by query; ``parts`` maps the student's role to the teacher's.

    As printed for each image, or with KD-DETR's factor, confidence and divisor.
    """
    totals = {"class": 0.0, "l1": 0.0, "giou": 0.0}
    for ours, theirs in pairs:
        sums, weight = dict.fromkeys(totals, 0.0), 0.0
        for role, teacher_role in parts.items():
            student, teacher = step.student_outputs[role], step.teacher_outputs[teacher_role]
            padding = student.group.padding
            for image in range(len(step.targets)):
                for query in range(student.logits[ours].shape[1]):
                    if padding is not None and padding[image, query]:
                        continue
                    z_s, z_t = (
                        student.logits[ours][image, query],
                        teacher.logits[theirs][image, query],
                    )
                    b_s, b_t = (
                        student.boxes[ours][image, query],
                        teacher.boxes[theirs][image, query],
                    )
                    w = float((z_t.softmax(-1) if printed else z_t.sigmoid()).max())
                    p, q = (z_t / 10).softmax(-1), (z_s / 10).softmax(-1)
                    sums["class"] += w * (1 if printed else 100) * float((p * (p / q).log()).sum())
                    sums["l1"] += w * 5 * float((b_s - b_t).abs().sum())
                    overlap = giou(cxcywh_to_xyxy(b_s), cxcywh_to_xyxy(b_t))
                    sums["giou"] += w * 2 * float(1 - overlap)
                    weight += w
        for name in totals:
            totals[name] += sums[name] / (len(step.targets) if printed else weight)
    return totals


PRINTED = {"squared_temperature": False, "confidence": "softmax", "normalize": False}


@pytest.mark.parametrize("printed", [False, True])
def test_logit_distillation_is_equation_9(
    printed: bool, student: Detector, teacher: Detector, take_step: TakeStep, method: MakeMethod
) -> None:
    options = PRINTED if printed else {}
    clock = method("clockdistill", student, teacher, general_points=4, **options)
    step = take_step(student, teacher, [clock])
    losses = clock.losses(step)
    parts = {f"clockdistill/{p}": f"clockdistill/{p}" for p in ("target_aware", "general")}
    parts["clockdistill/specific"] = "own"
    for name, value in equation_9(step, parts, [(0, 0), (1, 1)], printed).items():
        assert losses[f"clockdistill/{name}"].item() == pytest.approx(value, rel=1e-3)
        assert value > 0


def test_memory_distillation_is_equation_5(
    student: Detector, teacher: Detector, take_step: TakeStep, method: MakeMethod
) -> None:
    clock = method("clockdistill", student, teacher, **{**EVERYTHING_OFF, "memory": "masked"})
    step = take_step(student, teacher, [clock])
    losses = clock.losses(step)
    assert list(losses) == ["clockdistill/memory"]
    ours, theirs = step.student_memory, step.teacher_memory
    assert theirs is not None
    error = (ours.tokens - theirs.tokens).square().sum(-1)
    fg, bg = scale_masks(step.targets, ours)
    assert (fg[:, :96] > 0).any() and (bg[1] == 0).any()  # the second image leaves padding
    expected = (5e-5 * fg * error).sum() / 2 + (1e-7 * bg * error).sum() / 2
    torch.testing.assert_close(losses["clockdistill/memory"], expected)


def test_plain_memory_is_the_mean_squared_error_off_the_padding(
    student: Detector, teacher: Detector, take_step: TakeStep, method: MakeMethod
) -> None:
    options = {**EVERYTHING_OFF, "memory": "plain", "plain_weight": 3.0}
    clock = method("clockdistill", student, teacher, **options)
    step = take_step(student, teacher, [clock])
    ours, theirs = step.student_memory, step.teacher_memory
    assert theirs is not None and ours.padding.any()
    difference = (ours.tokens - theirs.tokens)[~ours.padding]
    torch.testing.assert_close(
        clock.losses(step)["clockdistill/memory"], 3 * difference.square().mean()
    )


@pytest.mark.parametrize("query", ["mixed", "two_stage", "learned"])
def test_an_equal_student_has_nothing_to_learn(
    query: str, build: Build, take_step: TakeStep, method: MakeMethod
) -> None:
    teacher = build(seed=3, query=query).eval()
    student = copy.deepcopy(teacher)
    clock = method("clockdistill", student, teacher)
    losses = clock.losses(take_step(student, teacher, [clock]))
    assert len(losses) == 4
    for name, value in losses.items():
        assert abs(value.item()) < 1e-5, name


@pytest.mark.parametrize("query", ["mixed", "two_stage", "learned"])
def test_gradients_reach_the_student_and_never_the_teacher(
    query: str, build: Build, reached: Callable[..., set[str]]
) -> None:
    teacher, student = build(seed=1, query=query).eval(), build(seed=2, query=query).train()
    moved = reached("clockdistill", student, teacher)
    for part in ("backbone", "neck", "encoder.layers.0", "decoder.layers.0", "decoder.layers.1"):
        assert any(name.startswith(part) for name in moved), part
    # The points are fixed queries: the student's own query table learns nothing from them.
    assert not any("source.content" in n or "source.embedding" in n for n in moved)


def test_memory_gradient_does_not_come_from_the_decoder(
    student: Detector, teacher: Detector, take_step: TakeStep, method: MakeMethod
) -> None:
    clock = method("clockdistill", student, teacher, **{**EVERYTHING_OFF, "memory": "masked"})
    clock.losses(take_step(student, teacher, [clock]))["clockdistill/memory"].backward()
    assert all(p.grad is None for n, p in student.named_parameters() if n.startswith("decoder."))
    assert any(p.grad is not None for n, p in student.named_parameters() if "encoder." in n)


def test_own_and_denoising_outputs_do_not_notice_the_points(
    student: Detector, teacher: Detector, take_step: TakeStep, method: MakeMethod
) -> None:
    alone = take_step(copy.deepcopy(student), teacher, [])
    clock = method("clockdistill", student, teacher)
    together = take_step(student, teacher, [clock])
    assert set(together.student_outputs) > {"own", "denoising", "clockdistill/general"}
    for outputs, reference in (
        (together.student_outputs, alone.student_outputs),
        (together.teacher_outputs, alone.teacher_outputs),
    ):
        for role, expected in reference.items():
            for ours, theirs in zip(outputs[role].logits, expected.logits, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_teacher_never_denoises(
    student: Detector, teacher: Detector, take_step: TakeStep, method: MakeMethod
) -> None:
    clock = method("clockdistill", student, teacher)
    step = take_step(student, teacher, [clock])
    assert [group.role for group in step.teacher_groups] == ["own"]
    # Its own queries are the specific points: it need not answer them twice.
    assert set(step.teacher_outputs) == {
        "own",
        "clockdistill/target_aware",
        "clockdistill/general",
    }


def test_images_without_objects(
    student: Detector, teacher: Detector, take_step: TakeStep, method: MakeMethod, target: Targets
) -> None:
    box = [[0.5, 0.5, 0.3, 0.3]]
    clock = method("clockdistill", student, teacher)
    only = method("clockdistill", student, teacher, **{**EVERYTHING_OFF, "target_aware": True})
    for targets in ([target([], [])] * 2, [target(box, [1]), target([], [])]):
        for tested in (clock, only):
            student.zero_grad()
            losses = tested.losses(take_step(student, teacher, [tested], targets))
            total = torch.stack(list(losses.values())).sum()
            assert total.isfinite()
            total.backward()
            assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)
    empty = only.losses(take_step(student, teacher, [only], [target([], [])] * 2))
    assert all(value.item() == 0 for value in empty.values())


@pytest.mark.parametrize(
    ("options", "keys", "roles"),
    [
        ({}, {"memory", "class", "l1", "giou"}, {"target_aware", "general", "specific"}),
        ({"memory": "off"}, {"class", "l1", "giou"}, {"target_aware", "general", "specific"}),
        ({"target_aware": False}, {"memory", "class", "l1", "giou"}, {"general", "specific"}),
        (
            {"general": False, "specific": False},
            {"memory", "class", "l1", "giou"},
            {"target_aware"},
        ),
        ({"general": False, "specific": False, "target_aware": False}, {"memory"}, set()),
    ],
)
def test_every_part_can_be_switched(
    options: dict[str, object],
    keys: set[str],
    roles: set[str],
    student: Detector,
    teacher: Detector,
    take_step: TakeStep,
    method: MakeMethod,
) -> None:
    clock = method("clockdistill", student, teacher, **options)
    step = take_step(student, teacher, [clock])
    assert set(clock.losses(step)) == {f"clockdistill/{key}" for key in keys}
    found = {role.split("/")[1] for role in step.student_outputs if role.startswith("clock")}
    assert found == roles


def test_weights_and_temperature_scale_their_terms(
    student: Detector, teacher: Detector, take_step: TakeStep, method: MakeMethod
) -> None:
    plain = method("clockdistill", student, teacher)
    step = take_step(student, teacher, [plain])
    options = {"alpha": 1e-4, "beta": 2e-7, "class_weight": 3, "l1_weight": 10, "giou_weight": 1}
    scaled = method("clockdistill", student, teacher, **options)
    before, after = plain.losses(step), scaled.losses(step)
    for key, factor in (("memory", 2), ("class", 3), ("l1", 2), ("giou", 0.5)):
        torch.testing.assert_close(
            after[f"clockdistill/{key}"], factor * before[f"clockdistill/{key}"]
        )
    cool = method("clockdistill", student, teacher, temperature=1).losses(step)
    assert not torch.allclose(cool["clockdistill/class"], before["clockdistill/class"], rtol=1e-2)


def test_unequal_depths_compare_the_last_layers(
    build: Build, take_step: TakeStep, method: MakeMethod
) -> None:
    teacher = build(seed=1, decoder={"layers": 3}, encoder={"layers": 2}).eval()
    student = build(seed=2, decoder={"layers": 2}, encoder={"layers": 0}).train()
    options = {**EVERYTHING_OFF, "target_aware": True}
    parts = {"clockdistill/target_aware": "clockdistill/target_aware"}
    for layer_map, pairs in ((None, [(1, 2)]), ((0, 2), [(0, 0), (1, 2)])):
        clock = method("clockdistill", student, teacher, **options, layer_map=layer_map)
        step = take_step(student, teacher, [clock])
        value = equation_9(step, parts, pairs)["l1"]
        assert clock.losses(step)["clockdistill/l1"].item() == pytest.approx(value, rel=1e-4)
    whole = method("clockdistill", student, teacher)
    assert all(v.isfinite() for v in whole.losses(take_step(student, teacher, [whole])).values())


def test_other_width_and_levels(build: Build, take_step: TakeStep, method: MakeMethod) -> None:
    teacher = build(seed=1, neck={"levels": 3}).eval()
    student = build(seed=2, width=16, neck={"levels": 2}, queries={"number": 5}).train()
    clock = method("clockdistill", student, teacher)
    losses = clock.losses(take_step(student, teacher, [clock]))
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in clock.parameters())
    assert sum(1 for _ in clock.parameters()) == 4  # memory adapter and query bridge


def test_models_that_share_no_level_are_refused(build: Build, method: MakeMethod) -> None:
    from detr.config import BackboneConfig

    far = build(backbone=BackboneConfig(name="test_resnet", strides=(32,)), neck={"levels": 1})
    near = build(backbone=BackboneConfig(name="test_resnet", strides=(8,)), neck={"levels": 1})
    with pytest.raises(UserError, match=r"strides \[8\].*\[32\]") as error:
        method("clockdistill", near, far)
    assert error.value.code == "method-levels"


def test_all_losses_are_single_precision_under_autocast(
    student: Detector, teacher: Detector, take_step: TakeStep, method: MakeMethod
) -> None:
    clock = method("clockdistill", student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        losses = clock.losses(take_step(student, teacher, [clock]))
    values: list[Tensor] = list(losses.values())
    assert all(v.dtype == torch.float32 and v.isfinite() for v in values)
