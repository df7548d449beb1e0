"""DETRDistill and DeFeat against loops."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from detr.models import Detector, GroupOutput, QueryGroup, Target, cxcywh_to_xyxy
from distill.losses.costs import MatchingCosts
from distill.losses.matcher import match
from distill.losses.overlap import iou
from distill.methods import Method
from distill.methods.detrdistill import good_queries, target_mask
from distill.methods.parts.masks import scale_masks
from distill.methods.parts.teacher_group import (
    ground_truth_losses,
    layer_matches,
    teacher_assigned,
)
from distill.methods.step import Step

Build = Callable[..., Detector]
TakeStep = Callable[..., Step]
MakeMethod = Callable[..., Method]
Targets = Callable[..., Target]
COSTS = MatchingCosts()


def test_logits_are_qskds_global_alignment(
    student: Detector, teacher: Detector, take_step: TakeStep, method: MakeMethod
) -> None:
    """The rival of QSKD's table 7 is this paper's part; both are checked against loops there."""
    ours = method("detrdistill", student, teacher, features=False, prior=False)
    rival = method("qskd", student, teacher, features=False, predictions="global")
    step = take_step(student, teacher, [ours])
    expected = rival.losses(step)
    found = ours.losses(step)
    assert set(found) == {"detrdistill/class", "detrdistill/l1", "detrdistill/giou"}
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key.replace("detrdistill", "qskd")])


def test_mask_by_hand(target: Targets) -> None:
    # Query 0 points along axis 0 and equals the box; query 1 along axis 1, apart from it.
    boxes = torch.tensor([[[0.2, 0.2, 0.4, 0.4], [0.8, 0.8, 0.2, 0.2]]])
    hidden = torch.tensor([[[2.0, 0.0], [0.0, 5.0]]])
    group = QueryGroup("own", hidden, boxes)
    output = GroupOutput(group, [torch.zeros(1, 2, 2)], [boxes], [hidden], [])
    maps = torch.tensor([[[[3.0, 0.0, 1.0]], [[0.0, 1.0, 1.0]]]])
    truth = [target([[0.2, 0.2, 0.4, 0.4]], [0])]
    # Quality 2 entries x 1/2 x IoU 1; cosines 1, 0 and 1 / sqrt 2.
    found = target_mask(good_queries(output, 0, truth, 100), maps)
    torch.testing.assert_close(found, torch.tensor([[[1.0, 0.01, 0.5**0.5]]]))
    nothing = good_queries(output, 0, [target([], [])], 100)
    assert target_mask(nothing, maps).tolist() == [[[1.0, 1.0, 1.0]]]


def test_features_in_loops(
    student: Detector, teacher: Detector, take_step: TakeStep, method: MakeMethod
) -> None:
    tested = method(
        "detrdistill", student, teacher, logits=False, prior=False, entries=5, feature_weight=1.0
    )
    step = take_step(student, teacher, [tested])
    output, memory = step.teacher_outputs["own"], step.teacher_memory
    assert memory is not None
    expected, start = 0.0, 0
    for height, width in memory.shapes:
        level = slice(start, start + height * width)
        start += height * width
        kept = ~memory.padding[:, level]
        theirs = memory.layers[0][:, level]
        error = (step.student_memory.layers[0][:, level] - theirs).square().mean(-1)
        for layer in (0, 1):
            masks = torch.zeros(2, height * width)
            for image in range(2):
                scores = output.logits[layer][image].sigmoid()
                truth = cxcywh_to_xyxy(step.targets[image].boxes)
                overlap = iou(cxcywh_to_xyxy(output.boxes[layer][image])[:, None], truth).amax(-1)
                for entry in scores.flatten().topk(5).indices.tolist():
                    query, label = divmod(entry, 3)
                    cosine = torch.nn.functional.cosine_similarity(
                        output.hidden[layer][image, query][None], theirs[image], dim=-1
                    )
                    masks[image] += cosine * scores[query, label] * overlap[query]
            masks = masks.clamp(min=0.01)
            masks = masks / masks.amax(1, keepdim=True)
            expected += float((masks * error * kept).detach().sum() / kept.sum())
    assert tested.losses(step)["detrdistill/features"].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("assignment", ["teacher", "rematch"])
def test_prior_group_keeps_or_makes_matches(
    assignment: str, student: Detector, teacher: Detector, take_step: TakeStep, method: MakeMethod
) -> None:
    tested = method(
        "detrdistill", student, teacher, logits=False, features=False, assignment=assignment
    )
    step = take_step(student, teacher, [tested])
    output, theirs = step.student_outputs["detrdistill/prior"], step.teacher_outputs["own"]
    torch.testing.assert_close(output.group.content, theirs.group.content)
    kept = None
    if assignment == "teacher":
        kept = layer_matches(theirs, [0, 1], step.targets, COSTS)
    matches = teacher_assigned(output, [0, 1], kept, step.targets, COSTS)
    side = theirs if assignment == "teacher" else output
    wanted = match(torch.stack(side.logits), torch.stack(side.boxes), step.targets, COSTS)
    assert sorted(zip(matches.layer.tolist(), matches.query.tolist(), strict=True)) == sorted(
        zip(wanted.layer.tolist(), wanted.query.tolist(), strict=True)
    )
    expected = ground_truth_losses(output, step.targets, matches, step.normalizer, tested.loss)  # type: ignore[arg-type]
    for key, value in expected.items():
        torch.testing.assert_close(tested.losses(step)[f"detrdistill/prior_{key}"], value)


def test_defeat_by_loops(
    student: Detector, teacher: Detector, take_step: TakeStep, method: MakeMethod
) -> None:
    tested = method("defeat", student, teacher, foreground=3.0, background=2.0)
    step = take_step(student, teacher, [tested])
    losses = tested.losses(step)  # its convolutions start as the identity
    ours, theirs = step.student_memory, step.teacher_memory
    assert theirs is not None
    error = (ours.tokens - theirs.tokens).square().sum(-1).detach()
    masks = scale_masks(step.targets, ours)
    for key, factor, mask in zip(("foreground", "background"), (3, 2), masks, strict=True):
        expected, start = 0.0, 0
        for height, width in ours.shapes:
            level = slice(start, start + height * width)
            start += height * width
            kept = mask[:, level] > 0
            expected += factor * float(error[:, level][kept].sum()) / (2 * max(1, int(kept.sum())))
        assert losses[f"defeat/{key}"].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["detrdistill", "defeat"])
def test_gradients_objects_and_an_untouched_teacher(
    name: str,
    student: Detector,
    teacher: Detector,
    take_step: TakeStep,
    method: MakeMethod,
    target: Targets,
) -> None:
    teacher = teacher.requires_grad_(True)
    before = copy.deepcopy(teacher.state_dict())
    tested = method(name, student, teacher)
    for targets in (None, [target([], [])] * 2, [target([[0.5] * 4], [1]), target([], [])]):
        student.zero_grad()
        losses = tested.losses(take_step(student, teacher, [tested], targets))
        assert all(v.isfinite() for v in losses.values())
        torch.stack(list(losses.values())).sum().backward()
        assert all(p.grad is None for p in teacher.parameters())
        assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)
        assert any(p.grad is not None and p.grad.any() for p in student.parameters())
    torch.testing.assert_close(teacher.state_dict(), before)
    assert all(p.grad is not None for p in tested.parameters())


@pytest.mark.parametrize("query", ["mixed", "two_stage", "learned"])
def test_an_equal_student_has_nothing_to_learn(
    query: str, build: Build, take_step: TakeStep, method: MakeMethod
) -> None:
    teacher = build(seed=3, query=query).eval()
    student = copy.deepcopy(teacher)
    tested = method("detrdistill", student, teacher, prior=False)
    step = take_step(student, teacher, [tested])
    losses = tested.losses(step)
    for key in ("l1", "giou", "features"):
        assert abs(losses[f"detrdistill/{key}"].item()) < 1e-5, key
    gradients = torch.autograd.grad(losses["detrdistill/class"], step.student_outputs["own"].logits)
    assert all(g.abs().max() < 1e-6 for g in gradients)
