"""OD-DETR: its parts against loops, and its teacher through the training loop."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from detr.errors import UserError
from detr.models import Detector, Target, cxcywh_to_xyxy
from distill.losses.costs import MatchingCosts
from distill.losses.detection import detection_losses
from distill.losses.matcher import match
from distill.losses.overlap import giou, iou
from distill.methods import METHODS, Method, Setting, build_methods
from distill.methods.parts.best_queries import best_queries, original_matches
from distill.methods.parts.two_matchings import Rules, matching_losses
from distill.methods.step import Step
from distill.training.ema import Ema

Build = Callable[..., Detector]
TakeStep = Callable[..., Step]
MakeMethod = Callable[..., Method]
Targets = Callable[..., Target]
COSTS = MatchingCosts()
OFF = {"matching": False, "prediction": False, "auxiliary": False}


def all_losses(method: Method, step: Step) -> dict[str, torch.Tensor]:
    found = method.detection_losses(step)
    assert found is not None
    return found | method.losses(step)


@torch.no_grad()
def equations_5_and_6(step: Step, listen: bool, aligned: bool) -> dict[str, float]:
    ours, theirs = step.student_outputs["od_detr/prediction"], step.teacher_outputs["own"]
    sums = {"class": 0.0, "l1": 0.0, "giou": 0.0}
    for layer in range(len(ours.logits)):
        matches = match(theirs.logits[layer][None], theirs.boxes[layer][None], step.targets, COSTS)
        owner = {
            (i, q): b
            for i, q, b in zip(
                matches.image.tolist(), matches.query.tolist(), matches.box.tolist(), strict=True
            )
        }
        for image, truth in enumerate(step.targets):
            for query in range(ours.logits[layer].shape[1]):
                p = ours.logits[layer][image, query].sigmoid()
                goal = theirs.logits[layer][image, query].sigmoid()
                b, b_t = (cxcywh_to_xyxy(o.boxes[layer][image, query]) for o in (ours, theirs))
                if (box := owner.get((image, query))) is not None:
                    label = int(truth.labels[box])
                    true_box = cxcywh_to_xyxy(truth.boxes[box])
                    theirs_iou, ours_iou = iou(b_t, true_box), iou(b, true_box)
                    if aligned:
                        goal[label] = goal[label] ** 0.25 * theirs_iou**0.75
                    if theirs_iou > ours_iou or not listen:
                        delta = ours.boxes[layer] - theirs.boxes[layer]
                        sums["l1"] += 5 * float(goal[label] * delta[image, query].abs().sum())
                        sums["giou"] += 2 * float(goal[label] * (1 - giou(b, b_t)))
                entropy = -(goal * p.log() + (1 - goal) * (1 - p).log())
                sums["class"] += float(((goal - p) ** 2 * entropy).sum())
    return {key: value / float(step.normalizer) for key, value in sums.items()}


@pytest.mark.parametrize("listen", [True, False])
@pytest.mark.parametrize("aligned", [True, False])
def test_prediction_distillation_is_equations_5_and_6(
    listen: bool,
    aligned: bool,
    student: Detector,
    teacher: Detector,
    take_step: TakeStep,
    method: MakeMethod,
) -> None:
    od = method("od_detr", student, teacher, auxiliary=False, listen=listen, task_aligned=aligned)
    step = take_step(student, teacher, [od])
    group = step.student_outputs["od_detr/prediction"].group
    torch.testing.assert_close(group.content, step.teacher_groups[0].content)
    torch.testing.assert_close(group.reference, step.teacher_groups[0].reference)
    losses = od.losses(step)
    for key, value in equations_5_and_6(step, listen, aligned).items():
        assert losses[f"od_detr/prediction_{key}"].item() == pytest.approx(value, rel=1e-3)


def test_query_prior_teaches_the_ground_truth_by_the_teachers_assignment(
    student: Detector, teacher: Detector, take_step: TakeStep, method: MakeMethod
) -> None:
    options = {"auxiliary": False, "prediction_target": "ground_truth"}
    od = method("od_detr", student, teacher, **options)
    step = take_step(student, teacher, [od])
    losses = od.losses(step)
    assert set(losses) == {f"od_detr/prediction_{key}" for key in ("class", "l1", "giou")}
    ours, theirs = step.student_outputs["od_detr/prediction"], step.teacher_outputs["own"]
    total = 0.0
    for layer in range(len(ours.logits)):
        matches = match(theirs.logits[layer][None], theirs.boxes[layer][None], step.targets, COSTS)
        columns = (matches.image, matches.query, matches.box)
        for i, q, b in zip(*(x.tolist() for x in columns), strict=True):
            delta = ours.boxes[layer][i, q].detach() - step.targets[i].boxes[b]
            total += 5 * float(delta.abs().sum()) / float(step.normalizer)
    assert losses["od_detr/prediction_l1"].item() == pytest.approx(total, rel=1e-4)
    gradients = torch.autograd.grad(losses["od_detr/prediction_class"], ours.logits)
    assert all((g.abs().sum(-1) > 0).all() for g in gradients)


def test_naive_prediction_moves_every_box(
    student: Detector, teacher: Detector, take_step: TakeStep, method: MakeMethod
) -> None:
    options = {"task_aligned": False, "listen": False, "unmatched_boxes": True}
    od = method("od_detr", student, teacher, auxiliary=False, **options)
    step = take_step(student, teacher, [od])
    output = step.student_outputs["od_detr/prediction"]
    gradients = torch.autograd.grad(od.losses(step)["od_detr/prediction_l1"], output.boxes)
    assert all((g.abs().sum(-1) > 0).all() for g in gradients)


def test_student_positions_put_the_teachers_content_at_the_students_anchors(
    student: Detector, teacher: Detector, take_step: TakeStep, method: MakeMethod
) -> None:
    od = method("od_detr", student, teacher, positions="student")
    step = take_step(student, teacher, [od])
    group = step.student_outputs["od_detr/prediction"].group
    torch.testing.assert_close(group.reference, step.student_groups[0].reference)
    torch.testing.assert_close(group.content, step.teacher_groups[0].content)


@pytest.mark.parametrize("layers", ["paired", "final"])
@pytest.mark.parametrize("cost_of", ["student", "teacher"])
def test_own_queries_learn_both_assignments(
    layers: str,
    cost_of: str,
    student: Detector,
    teacher: Detector,
    take_step: TakeStep,
    method: MakeMethod,
) -> None:
    od = method("od_detr", student, teacher, matching_layers=layers, cost_of=cost_of)
    step = take_step(student, teacher, [od])
    ours, theirs = step.student_outputs["own"], step.teacher_outputs["own"]
    stacked = [torch.stack(x) for x in (ours.logits, ours.boxes, theirs.logits, theirs.boxes)]
    expected = {"class": 0.0, "l1": 0.0, "giou": 0.0}
    for layer in (0, 1):
        z, b, z_t, b_t = (x[layer][None] for x in stacked)
        side = stacked[:2] if cost_of == "student" else stacked[2:]
        costs = COSTS.matrix(side[0][layer][None], side[1][layer][None], step.targets)
        if layers == "final":
            z_t, b_t = stacked[2][1][None], stacked[3][1][None]
        parts = matching_losses(
            z, b, step.targets, match(z, b, step.targets), match(z_t, b_t, step.targets), costs,
            step.normalizer, Rules(),
        )  # fmt: skip
        for key, value in parts.items():
            expected[key] += value.item()
    losses = od.detection_losses(step)
    assert losses is not None
    assert losses["own/class"].item() == pytest.approx(expected["class"], rel=1e-4)
    assert losses["own/l1"].item() == pytest.approx(5 * expected["l1"], rel=1e-4)
    assert losses["own/giou"].item() == pytest.approx(2 * expected["giou"], rel=1e-4)


def test_everything_off_is_the_detection_loss(
    student: Detector, teacher: Detector, take_step: TakeStep, method: MakeMethod
) -> None:
    od = method("od_detr", student, teacher, classification="focal", **OFF)
    step = take_step(student, teacher, [od])
    expected = detection_losses(
        step.student_outputs,
        step.targets,
        step.normalizer,
        od.loss,  # type: ignore[arg-type]
    )
    found = all_losses(od, step)
    assert set(found) == set(expected) and "denoising/class" in found and "proposals/l1" in found
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)


@pytest.mark.parametrize("kind", ["both", "original", "rematch"])
def test_auxiliary_group_is_matched_per_stage(
    kind: str, student: Detector, teacher: Detector, take_step: TakeStep, method: MakeMethod
) -> None:
    od = method("od_detr", student, teacher, prediction=False, auxiliary_matching=kind)
    mean = method("od_detr", student, teacher, auxiliary_matching=kind, auxiliary_sum="mean")
    step = take_step(student, teacher, [od])
    output = step.student_outputs["od_detr/auxiliary"]
    teacher_own = step.teacher_outputs["own"]
    predictions = torch.stack(teacher_own.logits), torch.stack(teacher_own.boxes)
    table = COSTS.matrix(*predictions, step.targets)
    chosen = best_queries(teacher_own, step.targets, table, 2)
    assert output.group.blocks == 2 and output.group.content.shape[1] == 2 * 2 * 2
    assert output.group.padding is not None and output.group.padding[1].sum() == 4
    original = original_matches(chosen, match(*predictions, step.targets), step.targets, 2)
    expected = 0.0
    for layer in (0, 1):
        for stage in (0, 1):
            part = slice(4 * stage, 4 * stage + 4)
            z, b = output.logits[layer][None, :, part], output.boxes[layer][None, :, part]
            rematch = match(z, b, step.targets, COSTS, chosen.padding)
            kept = original.at(2 * layer + stage, to=0)
            own, other = {
                "both": (rematch, kept), "original": (kept, None), "rematch": (rematch, None)
            }[kind]  # fmt: skip
            costs = COSTS.matrix(z, b, step.targets)
            parts = matching_losses(
                z, b, step.targets, own, other, costs, step.normalizer, Rules(), chosen.padding
            )
            expected += parts["class"].item() + 5 * parts["l1"].item() + 2 * parts["giou"].item()
    found = sum(v.item() for v in od.losses(step).values())
    assert found == pytest.approx(expected, rel=1e-4)
    halved = mean._auxiliary(step)["l1"].item()  # type: ignore[operator]
    assert 10 * halved == pytest.approx(od.losses(step)["od_detr/auxiliary_l1"].item(), rel=1e-4)


@pytest.mark.parametrize("query", ["mixed", "two_stage", "learned"])
def test_gradients_reach_the_student_and_never_the_teacher(
    query: str, build: Build, take_step: TakeStep, method: MakeMethod
) -> None:
    teacher, student = build(seed=1, query=query).eval(), build(seed=2, query=query).train()
    before = copy.deepcopy(teacher.state_dict())
    od = method("od_detr", student, teacher)
    step = take_step(student, teacher, [od])
    assert {"od_detr/prediction", "od_detr/auxiliary"} <= set(step.student_outputs)
    side = od.losses(step)
    names = [name for name, _ in student.named_parameters() if name.startswith("source.")]
    torch.stack(list(side.values())).sum().backward(retain_graph=True)
    assert all(p.grad is None for p in teacher.parameters())
    # Both groups are the teacher's queries, so the student's own tables learn nothing from them.
    tables = [n for n in names if "content" in n or "embedding" in n or "proposals" in n]
    parameters = dict(student.named_parameters())
    assert tables
    reached = {n for n, p in parameters.items() if p.grad is not None and p.grad.any()}
    for part in ("backbone", "encoder.layers.0", "decoder.layers.0", "decoder.class_heads"):
        assert any(name.startswith(part) for name in reached), part
    assert not reached & set(tables)
    student.zero_grad()
    torch.stack(list(all_losses(od, step).values())).sum().backward()
    torch.testing.assert_close(teacher.state_dict(), before)
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())
    assert any(parameters[n].grad is not None and parameters[n].grad.any() for n in tables)


def test_an_equal_student_has_no_boxes_to_learn_from_predictions(
    build: Build, take_step: TakeStep, method: MakeMethod
) -> None:
    teacher = build(seed=3).eval()
    student = copy.deepcopy(teacher)
    od = method("od_detr", student, teacher, listen=False, task_aligned=False)
    step = take_step(student, teacher, [od])
    losses = od.losses(step)
    # The factor |t - s|^2 makes even the classification vanish.
    for key in ("class", "l1", "giou"):
        assert abs(losses[f"od_detr/prediction_{key}"].item()) < 1e-6
    matched = match(
        *(torch.stack(getattr(step.student_outputs["own"], n)) for n in ("logits", "boxes")),
        step.targets,
    )
    theirs = od.teacher_assignment(step).matches  # type: ignore[operator]
    assert matched.query.tolist() == theirs.query.tolist()


def test_own_outputs_do_not_notice_the_groups(
    student: Detector, teacher: Detector, take_step: TakeStep, method: MakeMethod
) -> None:
    alone = take_step(copy.deepcopy(student), teacher, [])
    together = take_step(student, teacher, [method("od_detr", student, teacher)])
    for role, expected in alone.student_outputs.items():
        for ours, theirs in zip(
            together.student_outputs[role].logits, expected.logits, strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_shared_anchors_are_the_teachers_tokens(
    student: Detector, teacher: Detector, take_step: TakeStep, method: MakeMethod
) -> None:
    od = method("od_detr", student, teacher, shared_anchors=True)
    step = take_step(student, teacher, [od])
    ours = step.student_outputs["own"].group.proposals
    theirs = step.teacher_groups[0].proposals
    assert ours is not None and theirs is not None
    assert torch.equal(ours.indices, theirs.indices)
    assert not torch.equal(ours.boxes, theirs.boxes)
    plain = take_step(student, teacher, [method("od_detr", student, teacher)])
    proposals = plain.student_outputs["own"].group.proposals
    assert proposals is not None and not torch.equal(proposals.indices, theirs.indices)


def test_images_without_objects(
    student: Detector, teacher: Detector, take_step: TakeStep, method: MakeMethod, target: Targets
) -> None:
    od = method("od_detr", student, teacher)
    for targets in ([target([], [])] * 2, [target([[0.5, 0.5, 0.3, 0.3]], [1]), target([], [])]):
        student.zero_grad()
        losses = all_losses(od, take_step(student, teacher, [od], targets))
        torch.stack(list(losses.values())).sum().backward()
        assert all(v.isfinite() for v in losses.values())
        assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)
        if not len(targets[0].labels):
            assert losses["own/l1"].item() == losses["od_detr/prediction_l1"].item() == 0
            assert losses["od_detr/auxiliary_class"].item() == 0


@pytest.mark.parametrize(
    ("change", "told"),
    [({"decoder.layers": 1}, "has 1 and 7"), ({"queries": {"number": 5}}, "has 2 and 5")],
)
def test_a_teacher_that_is_no_average_of_the_student_is_refused(
    change: dict[str, Any], told: str, build: Callable[..., Detector]
) -> None:
    """Layers and queries are compared by number."""
    with pytest.raises(UserError, match=told) as error:
        build_methods([{"od_detr": {}}], build(), None, average=build(**change))
    assert error.value.code == "method-queries"


def test_the_teacher_stops_at_the_first_drop(student: Detector, teacher: Detector) -> None:
    od = build_methods([{"od_detr": {}}], student, teacher, steps=12, drops=[10, 11])[0]
    assert [od.updates_teacher(i) for i in (0, 9, 10, 11)] == [True, True, False, False]
    on = build_methods([{"od_detr": {"stop_update": False}}], student, teacher, drops=[10])[0]
    assert on.updates_teacher(11)
    options = METHODS["od_detr"].Options()
    assert METHODS["od_detr"](options, Setting(student, teacher)).updates_teacher(10**6)


def test_a_constant_decay_is_constant_from_the_start(student: Detector) -> None:
    average = Ema(student, 0.9996, rising=False)
    name = "decoder.norm.weight"
    start = average.model.state_dict()[name].clone()
    with torch.no_grad():
        student.state_dict()[name].add_(1.0)
    average.update(student, 0)
    torch.testing.assert_close(average.model.state_dict()[name], start + 0.0004)
    rising = Ema(student, 0.9996)
    start = rising.model.state_dict()[name].clone()
    with torch.no_grad():
        student.state_dict()[name].add_(1.0)
    rising.update(student, 0)
    torch.testing.assert_close(rising.model.state_dict()[name], start + 0.9)
