"""Stable-DINO's loss and cost on cases small enough to work by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from detr.models import Detector, Target
from distill.losses.costs import ALPHA, MatchingCosts
from distill.losses.detection import detection_losses
from distill.losses.matches import Matches
from distill.losses.scores import focal_loss
from distill.losses.weights import LossWeights
from distill.methods import Method, build_methods
from distill.methods.stable_dino import (
    modulated_cost,
    position_supervised,
    positional_target,
    rescaled,
)
from distill.methods.step import Step
from tests.models.heads.test_masks import mask_dino, with_masks

TakeStep = Callable[..., Step]
Targets = Callable[..., Target]
LN2 = math.log(2)
COSTS = MatchingCosts()
CLASSES_ONLY = MatchingCosts(1.0, 0.0, 0.0)

# Query 0 equals the first box, 1 overlaps it by a third, 2 lies apart.
LEFT, SHIFTED, RIGHT = [0.2, 0.2, 0.4, 0.4], [0.4, 0.2, 0.4, 0.4], [0.8, 0.8, 0.2, 0.2]
BOXES = torch.tensor([[[LEFT, SHIFTED, RIGHT]]])


def pairs(*rows: tuple[int, int]) -> Matches:
    """(query, box) pairs of the only layer and image."""
    table = torch.tensor([(0, 0, q, b) for q, b in rows], dtype=torch.int64).reshape(-1, 4)
    return Matches(*table.unbind(1))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("1", 1.0),
        ("s^0.5", 0.5),
        ("s", 0.25),
        ("s^2", 0.0625),
        ("s^3", 0.015625),
        ("s*p^0.25", 0.25 * 0.5),
        ("s*p", 0.25 * 0.0625),
        ("s^2*p", 0.0625 * 0.0625),
        ("exp", (math.exp(0.25) - 1) / (math.e - 1)),
        ("sin", math.sin(math.pi / 8)),
    ],
)
def test_every_f1_of_table_7(name: str, value: float) -> None:
    found = positional_target(name, torch.tensor([0.25]), torch.tensor([0.0625]))  # type: ignore[arg-type]
    assert found.item() == pytest.approx(value, rel=1e-5)


def test_equation_3_by_hand(target: Targets) -> None:
    truth = [target([LEFT], [1])]
    logits = torch.zeros(1, 1, 3, 2, requires_grad=True)
    loss = position_supervised(logits, BOXES, truth, pairs((1, 0)), "s^2", "none")
    # One positive: target 1/9 against s = 1/2; five zeros.
    expected = (0.25 * (1 / 9 - 0.5) ** 2 + 5 * 0.75 * 0.25) * LN2
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    loss = position_supervised(logits, BOXES, truth, pairs((1, 0)), "s^2", "one")
    assert loss.item() == pytest.approx((0.25 * 0.25 + 5 * 0.75 * 0.25) * LN2, rel=1e-4)
    loss = position_supervised(logits, BOXES, truth, pairs((0, 0)), "1", "one")
    one_hot = torch.zeros(1, 1, 3, 2)
    one_hot[0, 0, 0, 1] = 1
    torch.testing.assert_close(loss, focal_loss(logits, one_hot).sum())


def test_rescaling_by_hand(target: Targets) -> None:
    truth = [target([LEFT, RIGHT], [0, 0])]
    matches = pairs((1, 0), (2, 1))
    goal = torch.tensor([1 / 9, 1 / 3])
    one = rescaled(goal, matches, BOXES, truth, "one")
    assert one.tolist() == pytest.approx([1 / 3, 1.0], rel=1e-5)
    # The best IoU of any pair: query 0 equals box 0, so 1; without query 0 and box 1 it is 1/3.
    best = rescaled(goal, matches, BOXES, truth, "max_iou")
    assert best.tolist() == pytest.approx([1 / 3, 1.0], rel=1e-5)
    alone = rescaled(goal[:1], pairs((0, 0)), BOXES[:, :, 1:2], [target([LEFT], [0])], "max_iou")
    assert alone.tolist() == pytest.approx([1 / 3], rel=1e-5)
    # The factor never shrinks.
    high = rescaled(torch.tensor([0.9]), pairs((0, 0)), BOXES[:, :, 1:2], truth[:1], "max_iou")
    assert high.tolist() == pytest.approx([0.9])
    assert rescaled(goal, matches, BOXES, truth, "none") is goal


def test_rescaling_is_per_layer_and_image(target: Targets) -> None:
    boxes = BOXES.expand(2, 2, -1, -1)
    truth = [target([LEFT], [0]), target([LEFT], [0])]
    matches = Matches(*torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1], [0, 0, 1, 1], [0] * 4]))
    goal = torch.tensor([0.5, 0.25, 0.1, 1.0])
    torch.testing.assert_close(rescaled(goal, matches, boxes, truth, "one"), torch.ones(4))


def test_targets_carry_no_gradient(target: Targets) -> None:
    boxes = BOXES.clone().requires_grad_()
    logits = torch.zeros(1, 1, 3, 1, requires_grad=True)
    position_supervised(
        logits, boxes, [target([LEFT], [0])], pairs((1, 0)), "s*p", "one"
    ).backward()
    assert boxes.grad is None and logits.grad is not None and logits.grad.any()


def test_equation_4_by_hand(target: Targets) -> None:
    truth = [target([LEFT], [0])]
    logits = torch.zeros(1, 1, 3, 1)
    found = modulated_cost(logits, BOXES, truth, CLASSES_ONLY, 0.5, False, False)[0, 0, :, 0]
    # s' = (GIoU + 1) / 2: 1 for query 0, (1/3 + 1) / 2 for query 1.
    expected = []
    for s in (1.0, 2 / 3):
        p = 0.5 * math.sqrt(s)
        expected.append(ALPHA * (1 - p) ** 2 * -math.log(p) - (1 - ALPHA) * p**2 * -math.log(1 - p))
    assert found[:2].tolist() == pytest.approx(expected, rel=1e-4)
    # Without query 0, rescaling raises query 1's 2/3 to 1.
    raised = modulated_cost(
        logits[:, :, 1:], BOXES[:, :, 1:], truth, CLASSES_ONLY, 0.5, True, False
    )
    assert raised[0, 0, 0, 0].item() == pytest.approx(expected[0], rel=1e-4)
    plain = modulated_cost(logits, BOXES, truth, COSTS, 0.0, True, False)
    torch.testing.assert_close(plain, COSTS.matrix(logits, BOXES, truth))


def test_rescaling_the_cost_ignores_filled_up_columns(target: Targets) -> None:
    truth = [target([SHIFTED], [0]), target([LEFT, SHIFTED], [0, 0])]
    boxes = BOXES[:, :, :1].expand(1, 2, 1, 4)
    found = modulated_cost(torch.zeros(1, 2, 1, 1), boxes, truth, CLASSES_ONLY, 1.0, True, False)
    alone = modulated_cost(
        torch.zeros(1, 1, 1, 1), boxes[:, :1], truth[:1], CLASSES_ONLY, 1.0, True, False
    )
    torch.testing.assert_close(found[0, 0, 0, 0], alone[0, 0, 0, 0])


def test_class_scatter_sees_the_last_box_of_a_class_in_the_batch(target: Targets) -> None:
    truth = [target([LEFT], [1]), target([SHIFTED, RIGHT], [1, 0])]
    boxes = BOXES.expand(1, 2, 3, 4)
    logits = torch.zeros(1, 2, 3, 2)
    found = modulated_cost(logits, boxes, truth, CLASSES_ONLY, 1.0, False, True)
    # Image 0's box is measured at image 1's SHIFTED, the last of class 1.
    moved = modulated_cost(
        logits, boxes, [target([SHIFTED], [1]), truth[1]], CLASSES_ONLY, 1.0, False, False
    )
    torch.testing.assert_close(found[0, 0, :, 0], moved[0, 0, :, 0])
    torch.testing.assert_close(found[0, 1], moved[0, 1])
    # One box per class: nothing to mix up.
    single = [target([LEFT, RIGHT], [0, 1])]
    args = (logits[:, :1], boxes[:, :1], single, COSTS, 0.5, True)
    torch.testing.assert_close(modulated_cost(*args, True), modulated_cost(*args, False))


def step_and_method(
    student: Detector, take_step: TakeStep, targets: list[Target] | None = None, **options: object
) -> tuple[Step, Method]:
    method = build_methods([{"stable_dino": options}], student, None)[0]
    return take_step(student, None, [method], targets), method


def test_needs_no_teacher_and_covers_every_set(student: Detector, take_step: TakeStep) -> None:
    step, method = step_and_method(student, take_step)
    losses = method.detection_losses(step)
    assert losses is not None and method.losses(step) == {}
    expected = {
        f"{s}/{k}" for s in ("own", "proposals", "denoising") for k in ("class", "l1", "giou")
    }
    assert set(losses) == expected
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())
    assert any(p.grad is not None and p.grad.any() for p in student.denoiser.parameters())  # type: ignore[union-attr]


def test_everything_off_is_the_detection_loss(student: Detector, take_step: TakeStep) -> None:
    options = {"target": "1", "cost_exponent": 0, "class_weight": 1, "denoising": "focal"}
    step, method = step_and_method(student, take_step, **options)
    losses = method.detection_losses(step)
    assert losses is not None
    expected = detection_losses(step.student_outputs, step.targets, step.normalizer, LossWeights())
    for key, value in expected.items():
        torch.testing.assert_close(losses[key], value)


def test_class_weights(student: Detector, take_step: TakeStep) -> None:
    step, six = step_and_method(student, take_step)
    three = build_methods(
        [{"stable_dino": {"class_weight": 3.0, "denoising_class_weight": 2.0}}], student, None
    )[0]
    before, after = six.detection_losses(step), three.detection_losses(step)
    assert before is not None and after is not None
    torch.testing.assert_close(after["own/class"], before["own/class"] / 2)
    torch.testing.assert_close(after["proposals/class"], before["proposals/class"] / 2)
    torch.testing.assert_close(after["denoising/class"], before["denoising/class"] * 2)
    torch.testing.assert_close(after["own/l1"], before["own/l1"])


def test_images_without_objects(student: Detector, take_step: TakeStep, target: Targets) -> None:
    for scatter in (False, True):
        for targets in ([target([], [])] * 2, [target([LEFT], [1]), target([], [])]):
            student.zero_grad()
            step, method = step_and_method(student, take_step, targets, class_scatter=scatter)
            losses = method.detection_losses(step)
            assert losses is not None and all(v.isfinite() for v in losses.values())
            torch.stack(list(losses.values())).sum().backward()
            assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())


def test_stable_dino_has_masks(take_step: TakeStep, target: Targets) -> None:
    """Stable-MaskDINO: masks learn in every set, by the recipe's weights, and weigh in the cost."""
    detector = mask_dino()
    boxes = target([LEFT, RIGHT], [0, 1])
    with_masks([boxes], (64, 96))
    none = target([], [])
    with_masks([none], (64, 96))

    def losses(**changes: float) -> dict[str, torch.Tensor]:
        weights = LossWeights(mask_points=32, **changes)
        method = build_methods([{"stable_dino": {}}], detector, None, loss=weights)[0]
        found = method.detection_losses(take_step(detector, None, [method], [boxes, none]))
        assert found is not None
        return found

    found, doubled = losses(), losses(mask=10.0)
    sets = ("own", "proposals", "denoising")
    assert {f"{s}/{k}" for s in sets for k in ("class", "l1", "giou", "mask", "dice")} == set(found)
    for s in sets:
        torch.testing.assert_close(doubled[f"{s}/mask"], 2 * found[f"{s}/mask"])
    torch.stack(list(found.values())).sum().backward()
    head = detector.decoder.mask_heads[0].parameters()
    assert all(p.grad is not None and p.grad.any() for p in head)
