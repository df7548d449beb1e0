"""The mask term of pairs: its formula, where it is least, and in every method that has it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from detr.errors import UserError
from detr.models import Detector, GroupOutput, PixelMap, QueryGroup, Target
from distill.losses.masks import Points, uncertain_points
from distill.losses.weights import LossWeights
from distill.methods import Method, build_methods
from distill.methods.base import Setting
from distill.methods.parts.mask_pairs import MaskOptions, MaskPairs, QueryPairs, divergence
from distill.methods.step import Step

MASKS = {"heads.masks": {"width": 16, "channels": 16}}
# Every method that distils predictions, and a setting in which its predictions alone are distilled.
METHODS: dict[str, dict[str, Any]] = {
    "qskd": {"features": False, "threshold": -0.9},
    "d3etr": {"self_attention": False, "cross_attention": False, "ground_truth": False},
    "kd_detr": {"layers": "paired"},
    "clockdistill": {"memory": "off"},
    "detrdistill": {"features": False, "prior": False},
    "od_detr": {"auxiliary": False, "listen": False},
}
LOSS = LossWeights(mask_points=40)


@pytest.fixture
def teacher(build: Callable[..., Detector]) -> Detector:
    return build(seed=1, **MASKS).eval().requires_grad_(False)


@pytest.fixture
def student(build: Callable[..., Detector]) -> Detector:
    """Another width of pixels, which need not be the teacher's."""
    changes: dict[str, Any] = {"heads.masks": {"width": 8, "channels": 12}}
    return build(seed=2, **changes).train()


def make(name: str, student: Detector, teacher: Detector | None, **options: Any) -> Method[Any]:
    specs = [{name: {**METHODS[name], "mask_weight": 2.0, **options}}]
    return build_methods(specs, student, teacher, loss=LOSS)[0]


def of_masks(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {key: value for key, value in losses.items() if key.endswith("mask")}
    assert found
    return found


def test_divergence_by_hand() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 20), torch.randn(3, 20)
    for ours, theirs, found in zip(student, teacher, divergence(student, teacher), strict=True):
        p, q = ours.sigmoid(), theirs.sigmoid()
        kl = (q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()).mean()
        dice = 1 - (2 * (p * q).sum() + 1) / ((p * p).sum() + (q * q).sum() + 1)
        torch.testing.assert_close(found, kl + dice)
    # For masks of zeros and ones, dice is that of the detection loss.
    hard = torch.tensor([[40.0, -40.0, 40.0]]), torch.tensor([[40.0, 40.0, -40.0]])
    dice = 1 - (2 * 1 + 1) / (2 + 2 + 1)
    apart = divergence(*hard) - F.binary_cross_entropy_with_logits(hard[0], hard[1].sigmoid())
    torch.testing.assert_close(apart, torch.tensor([dice]))


def test_it_is_least_where_masks_agree() -> None:
    torch.manual_seed(0)
    teacher = 3 * torch.randn(4, 30)
    student = teacher.clone().requires_grad_(True)
    found = divergence(student, teacher)
    torch.testing.assert_close(found, torch.zeros(4), atol=1e-6, rtol=0)
    (gradient,) = torch.autograd.grad(found.sum(), student)
    assert gradient.abs().max() < 1e-7
    assert (divergence(teacher + 0.1, teacher) > 1e-5).all()
    # And no other way is downhill for long.
    optimizer = torch.optim.Adam([other := torch.randn(4, 30, requires_grad=True)], lr=0.1)
    for _ in range(600):
        optimizer.zero_grad()
        divergence(other, teacher).sum().backward()
        optimizer.step()
    torch.testing.assert_close(other.detach().sigmoid(), teacher.sigmoid(), atol=0.01, rtol=0)


def answers(layers: int, queries: int, channels: int, size: tuple[int, int]) -> GroupOutput:
    """Answers of masks alone: two images, of which the second fills a part of its canvas."""
    share = torch.tensor([[1.0, 1.0], [0.6, 0.75]])
    pixels = PixelMap(torch.randn(2, channels, *size), share * torch.tensor(size[::-1]))
    nothing = torch.zeros(2, queries, 4)
    return GroupOutput(
        QueryGroup("own", nothing, nothing),
        logits=[],
        boxes=[nothing] * layers,
        hidden=[],
        references=[],
        masks=[torch.randn(2, queries, channels) for _ in range(layers)],
        pixels=pixels,
    )


def test_maps_of_other_sizes_are_compared_at_the_same_points(
    student: Detector, teacher: Detector, take_step: Callable[..., Step]
) -> None:
    torch.manual_seed(1)
    ours, theirs = answers(2, 5, 6, (8, 12)), answers(3, 7, 4, (20, 16))
    assert ours.pixels is not None and theirs.pixels is not None
    setting = Setting(student, teacher, LOSS)
    term = MaskPairs(MaskOptions(mask_weight=3.0), setting, ((0, 1), (1, 2)), "m")
    pairs = QueryPairs(*torch.tensor([[1, 1, 3, 6], [0, 0, 2, 5]]).T)
    step = take_step(student, teacher, [])
    step.generators = [torch.Generator().manual_seed(i) for i in range(2)]
    found = term.distances(step, ours, theirs, pairs)
    drawn = Points(40, [torch.Generator().manual_seed(i) for i in range(2)])
    for r, (layer, image, query, other) in enumerate([(1, 1, 3, 6), (0, 0, 2, 5)]):
        one = ours.mask_logits(layer)[image, query]
        two = theirs.mask_logits(layer + 1)[image, other]
        extents = ours.pixels.extent[image], theirs.pixels.extent[image]
        places = uncertain_points(one[None], extents[0], drawn, image)
        told, goal = (
            F.grid_sample(x[None, None], (places * extent * 2 - 1)[:, None], align_corners=False)
            for x, extent in zip((one, two), extents, strict=True)
        )
        torch.testing.assert_close(found[r], 3 * divergence(told[0, 0], goal[0, 0])[0])


@pytest.mark.parametrize("name", METHODS)
def test_every_method_that_distils_predictions(
    name: str, student: Detector, teacher: Detector, take_step: Callable[..., Step]
) -> None:
    """The term is there when it is asked for, and a few steps on it alone lower it."""
    tested = make(name, student, teacher)
    modules = (student.decoder.mask_heads, student.pixels)
    learned = [p for module in modules if module is not None for p in module.parameters()]
    optimizer = torch.optim.Adam(learned, lr=0.01)
    course = []
    for _ in range(8):
        losses = of_masks(tested.losses(take_step(student, teacher, [tested])))
        total = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        total.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in learned)
        assert all(p.grad is None for p in teacher.parameters())
        optimizer.step()
        course.append(float(total.detach()))
    assert course[-1] < 0.9 * course[0]
    assert all(p.grad is not None and p.grad.any() for p in learned)


@pytest.mark.parametrize("name", METHODS)
def test_a_student_that_is_the_teacher_has_nothing_to_learn(
    name: str, teacher: Detector, take_step: Callable[..., Step]
) -> None:
    pupil = copy.deepcopy(teacher).requires_grad_(True)
    tested = make(name, pupil, teacher)
    losses = of_masks(tested.losses(take_step(pupil, teacher, [tested])))
    torch.stack(list(losses.values())).sum().backward()
    for key, value in losses.items():
        assert float(value.detach()) == pytest.approx(0, abs=1e-5), key
    for parameter in pupil.decoder.mask_heads.parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() < 1e-4


@pytest.mark.parametrize("name", METHODS)
def test_off_by_default(
    name: str, student: Detector, teacher: Detector, take_step: Callable[..., Step]
) -> None:
    tested = build_methods([{name: METHODS[name]}], student, teacher, loss=LOSS)[0]
    found = tested.losses(take_step(student, teacher, [tested]))
    assert not [key for key in found if "mask" in key]
    assert "masks" not in type(tested).needs(tested.options)


@pytest.mark.parametrize("name", METHODS)
def test_images_without_objects(
    name: str,
    student: Detector,
    teacher: Detector,
    take_step: Callable[..., Step],
    target: Callable[..., Target],
) -> None:
    tested = make(name, student, teacher)
    step = take_step(student, teacher, [tested], [target([], []), target([], [])])
    losses = tested.losses(step)
    assert all(value.isfinite() for value in losses.values())
    torch.stack(list(losses.values())).sum().backward()


# What switches off the predictions of each method.
OFF: dict[str, dict[str, Any]] = {
    "qskd": {"predictions": "off", "features": True},
    "d3etr": {"prediction": False},
    "kd_detr": {"general": False, "specific": False},
    "clockdistill": {"target_aware": False, "general": False, "specific": False},
    "detrdistill": {"logits": False},
    "od_detr": {"prediction_target": "ground_truth"},
}


@pytest.mark.parametrize("name", METHODS)
def test_refused_where_it_would_do_nothing(
    name: str, build: Callable[..., Detector], student: Detector, teacher: Detector
) -> None:
    plain = build(seed=3)
    with pytest.raises(UserError, match=f"{name}.mask_weight: the student has no masks") as found:
        make(name, plain, teacher)
    assert found.value.code == "method-masks"
    with pytest.raises(UserError, match=f"{name}.mask_weight: goes with predictions") as found:
        make(name, student, teacher, **OFF[name])
    assert found.value.code == "method-masks"
    if name != "od_detr":  # its teacher is the student's average
        with pytest.raises(UserError, match=f"{name}: needs the teacher's masks; a DETR") as found:
            make(name, student, plain.eval())
        assert found.value.code == "method-teacher"
