"""D3ETR against its equations, in loops and dense maps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import permutations

import pytest
import torch

from detr.errors import UserError
from detr.models import Detector, GroupOutput, QueryGroup, Target
from distill.losses.costs import MatchingCosts
from distill.losses.matcher import match
from distill.methods import Method
from distill.methods.parts.attended_cells import attended_cells, dense
from distill.methods.parts.prediction_pairs import Predictions, distances
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


@torch.no_grad()
def cost(step: Step, layer: int, image: int, i: int, j: int) -> float:
    ours, theirs = step.student_outputs["own"], step.teacher_outputs["own"]
    d = distances(
        Predictions(ours.logits[layer][image, i], ours.boxes[layer][image, i]),
        Predictions(theirs.logits[layer][image, j], theirs.boxes[layer][image, j]),
        mean=True,
    )
    return float(20 * d.classes + 5 * d.l1 + 2 * d.giou)


def test_adaptive_matching_is_equation_6_and_losses_are_8_to_11(
    build: Build, take_step: TakeStep, method: MakeMethod
) -> None:
    teacher, student = (
        build(seed=1, queries={"number": 5}).eval(),
        build(seed=2, queries={"number": 4}).train(),
    )
    d3 = method("d3etr", student, teacher, fixed=0)
    step = take_step(student, teacher, [d3])
    assert set(step.student_outputs) == {"own", "denoising"}
    losses = d3.losses(step)
    assert set(losses) == {f"d3etr/own_{k}" for k in ("class", "l1", "giou", "self", "cross")}
    ours, theirs = step.student_outputs["own"], step.teacher_outputs["own"]
    shapes = step.student_memory.shapes
    predicted = own = cross = 0.0
    for layer in range(2):
        maps = [dense(attended_cells(o.attention[layer], shapes)).detach() for o in (ours, theirs)]
        for image in range(2):
            chosen = min(
                permutations(range(5), 4),
                key=lambda p: sum(cost(step, layer, image, i, j) for i, j in enumerate(p)),
            )
            predicted += sum(cost(step, layer, image, i, j) for i, j in enumerate(chosen)) / 8
            index = torch.tensor(chosen)
            theirs_map = theirs.self_attention[layer][image][:, index][:, :, index]
            error = ours.self_attention[layer][image] - theirs_map
            own += float(error.detach().square().mean()) / 2
            error = maps[0][image] - maps[1][image][index]
            cross += float(error.square().mean()) / 2
    total = sum(losses[f"d3etr/own_{k}"].item() for k in ("class", "l1", "giou"))
    assert total == pytest.approx(predicted, rel=1e-4)
    assert losses["d3etr/own_self"].item() == pytest.approx(1e4 * own, rel=1e-3)
    assert losses["d3etr/own_cross"].item() == pytest.approx(1e4 * cross, rel=1e-3)


def test_renormalized_rows_sum_to_one(
    build: Build, take_step: TakeStep, method: MakeMethod
) -> None:
    teacher, student = build(seed=1).eval(), build(seed=2, queries={"number": 4}).train()
    options = {"fixed": 0, "prediction": False, "cross_attention": False, "matching": "index"}
    plain = method("d3etr", student, teacher, **options)
    scaled = method("d3etr", student, teacher, renormalize=True, **options)
    step = take_step(student, teacher, [plain])
    ours = [m.detach() for m in step.student_outputs["own"].self_attention]
    theirs = [m[:, :, :4, :4] for m in step.teacher_outputs["own"].self_attention]
    for tested, maps in ((plain, theirs), (scaled, [m / m.sum(-1, keepdim=True) for m in theirs])):
        expected = sum(float((a - b).square().mean()) for a, b in zip(ours, maps, strict=True))
        assert tested.losses(step)["d3etr/own_self"].item() == pytest.approx(1e4 * expected)


def test_fixed_group_is_compared_index_by_index(
    student: Detector, teacher: Detector, take_step: TakeStep, method: MakeMethod
) -> None:
    d3 = method("d3etr", student, teacher, adaptive=0)
    step = take_step(student, teacher, [d3])
    ours, theirs = step.student_outputs["d3etr/fixed1"], step.teacher_outputs["own"]
    torch.testing.assert_close(ours.group.content, theirs.group.content)
    torch.testing.assert_close(ours.group.reference, theirs.group.reference)
    losses = d3.losses(step)
    d = [
        distances(
            Predictions(ours.logits[i], ours.boxes[i]),
            Predictions(theirs.logits[i], theirs.boxes[i]),
            mean=True,
        )
        for i in (0, 1)
    ]
    expected = 20 * (d[0].classes.mean() + d[1].classes.mean())
    torch.testing.assert_close(losses["d3etr/fixed1_class"], expected)
    errors = [
        (a - b).square().mean()
        for a, b in zip(ours.self_attention, theirs.self_attention, strict=True)
    ]
    torch.testing.assert_close(losses["d3etr/fixed1_self"], 1e4 * sum(errors))


def test_heads_can_be_averaged(
    build: Build, teacher: Detector, take_step: TakeStep, method: MakeMethod
) -> None:
    student = build(seed=2, attention_heads=2).train()
    options = {"adaptive": 0, "self_attention": False, "prediction": False, "heads": "mean"}
    d3 = method("d3etr", student, teacher, **options)
    step = take_step(student, teacher, [d3])
    shapes = step.student_memory.shapes
    expected = 0.0
    for ours, theirs in zip(
        step.student_outputs["d3etr/fixed1"].attention,
        step.teacher_outputs["own"].attention,
        strict=True,
    ):
        maps = [dense(attended_cells(a, shapes)).mean(2) for a in (ours, theirs)]
        expected += (maps[0] - maps[1]).square().mean().item()
    found = d3.losses(step)["d3etr/fixed1_cross"].item()
    assert found == pytest.approx(1e4 * expected, rel=1e-3)


def output(boxes: list[list[list[float]]], role: str = "own") -> GroupOutput:
    """One image, one class; logits all zero, boxes per layer."""
    layers = [torch.tensor([b]) for b in boxes]
    count = layers[0].shape[1]
    group = QueryGroup(role, torch.zeros(1, count, 4), torch.zeros(1, count, 4))
    return GroupOutput(group, [torch.zeros(1, count, 1) for _ in layers], layers, [], [])


def test_equation_7_by_hand(target: Targets) -> None:
    near, far = [0.3, 0.3, 0.2, 0.2], [0.7, 0.7, 0.2, 0.2]
    truth = [target([near], [0])]
    student, teacher = output([[near, far], [near, far]]), output([[near, far], [far, near]])
    theirs = layer_matches(teacher, [1], truth, COSTS)
    none = teacher_assigned(student, [], None, truth, COSTS)
    last = teacher_assigned(student, [1], theirs, truth, COSTS)
    assert dict(zip(none.layer.tolist(), none.query.tolist(), strict=True)) == {0: 0, 1: 0}
    assert dict(zip(last.layer.tolist(), last.query.tolist(), strict=True)) == {0: 0, 1: 1}
    # A shallower student's last layer takes the teacher's last.
    short = output([[near, far]])
    mapped = teacher_assigned(short, [0], theirs, truth, COSTS)
    assert mapped.layer.tolist() == [0] and mapped.query.tolist() == [1]


@pytest.mark.parametrize("constraint", ["none", "last", "all"])
def test_fixed_group_learns_the_ground_truth_under_the_constraint(
    constraint: str, student: Detector, teacher: Detector, take_step: TakeStep, method: MakeMethod
) -> None:
    d3 = method("d3etr", student, teacher, constraint=constraint)
    step = take_step(student, teacher, [d3])
    losses = d3.losses(step)
    ours, theirs = step.student_outputs["d3etr/fixed1"], step.teacher_outputs["own"]
    layers = {"none": [], "last": [1], "all": [0, 1]}[constraint]
    kept = layer_matches(theirs, layers, step.targets, COSTS) if layers else None
    matches = teacher_assigned(ours, layers, kept, step.targets, COSTS)
    if constraint == "all":
        expected_matches = match(
            torch.stack(theirs.logits), torch.stack(theirs.boxes), step.targets, COSTS
        )
        found = sorted(zip(*(x.tolist() for x in vars(matches).values()), strict=True))
        wanted = sorted(zip(*(x.tolist() for x in vars(expected_matches).values()), strict=True))
        assert found == wanted
    expected = ground_truth_losses(ours, step.targets, matches, step.normalizer, d3.loss)  # type: ignore[arg-type]
    for key, value in expected.items():
        torch.testing.assert_close(losses[f"d3etr/fixed1_gt_{key}"], value)
    assert "d3etr/own_gt_class" not in losses  # the detection loss sees to that


@pytest.mark.parametrize("query", ["mixed", "two_stage", "learned"])
def test_two_groups_of_one_kind(
    query: str, build: Build, take_step: TakeStep, method: MakeMethod
) -> None:
    teacher, student = build(seed=1, query=query).eval(), build(seed=2, query=query).train()
    d3 = method("d3etr", student, teacher, adaptive=2, fixed=2)
    step = take_step(student, teacher, [d3])
    roles = {r for r in step.student_outputs if r.startswith("d3etr/")}
    assert roles == {"d3etr/adaptive2", "d3etr/fixed1", "d3etr/fixed2"}
    losses = d3.losses(step)
    torch.testing.assert_close(losses["d3etr/fixed1_l1"], losses["d3etr/fixed2_l1"])
    assert losses["d3etr/adaptive2_l1"] != losses["d3etr/own_l1"]
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in d3.parameters())


@pytest.mark.parametrize("query", ["mixed", "two_stage", "learned"])
def test_an_equal_student_has_nothing_to_learn(
    query: str, build: Build, take_step: TakeStep, method: MakeMethod
) -> None:
    teacher = build(seed=3, query=query).eval()
    student = copy.deepcopy(teacher)
    d3 = method("d3etr", student, teacher, ground_truth=False)
    step = take_step(student, teacher, [d3])
    losses = d3.losses(step)
    for name, value in losses.items():
        if not name.endswith("class"):
            assert abs(value.item()) < 1e-4, name
    gradients = torch.autograd.grad(
        losses["d3etr/own_class"] + losses["d3etr/fixed1_class"],
        [*step.student_outputs["own"].logits, *step.student_outputs["d3etr/fixed1"].logits],
    )
    assert all(g.abs().max() < 1e-5 for g in gradients)


@pytest.mark.parametrize(
    "changes",
    [{}, {"width": 16}, {"decoder.layers": 1}, {"queries.number": 4}, {"queries.number": 9}],
)
def test_gradients_reach_the_student_and_never_the_teacher(
    changes: dict[str, object], build: Build, teacher: Detector, reached: Callable[..., set[str]]
) -> None:
    moved = reached("d3etr", build(seed=2, **changes).train(), teacher)
    for part in ("self_attention.query_key", "cross_attention.sampling_offsets", "class_heads"):
        assert any(part in name for name in moved), part


def test_own_outputs_do_not_notice_the_groups(
    student: Detector, teacher: Detector, take_step: TakeStep, method: MakeMethod
) -> None:
    alone = take_step(copy.deepcopy(student), teacher, [])
    together = take_step(student, teacher, [method("d3etr", student, teacher, adaptive=2)])
    for role, expected in alone.student_outputs.items():
        for ours, theirs in zip(
            together.student_outputs[role].logits, expected.logits, strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_images_without_objects(
    student: Detector, teacher: Detector, take_step: TakeStep, method: MakeMethod, target: Targets
) -> None:
    d3 = method("d3etr", student, teacher)
    for targets in ([target([], [])] * 2, [target([[0.5, 0.5, 0.3, 0.3]], [1]), target([], [])]):
        student.zero_grad()
        losses = d3.losses(take_step(student, teacher, [d3], targets))
        torch.stack(list(losses.values())).sum().backward()
        assert all(v.isfinite() for v in losses.values())
        assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)
    assert losses["d3etr/fixed1_gt_l1"] > 0


@pytest.mark.parametrize(
    ("changes", "options", "code"),
    [
        ({"attention_heads": 2}, {}, "method-heads"),
        ({"query": "learned"}, {}, "method-queries"),
        ({"queries.number": 9}, {"matching": "index"}, "method-queries"),
        ({"neck.levels": 2}, {}, "method-levels"),
    ],
)
def test_models_that_cannot_be_paired(
    changes: dict[str, object],
    options: dict[str, object],
    code: str,
    build: Build,
    teacher: Detector,
    method: MakeMethod,
) -> None:
    with pytest.raises(UserError) as caught:
        method("d3etr", build(seed=2, **changes), teacher, **options)
    assert caught.value.code == code and "d3etr" in caught.value.message
