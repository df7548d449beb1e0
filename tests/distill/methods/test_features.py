"""FitNet, MGD and FGD: maps that follow maps."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from detr.config import BackboneConfig
from detr.errors import UserError
from detr.models import Detector, Target
from distill.methods import Method
from distill.methods.fgd import GcBlock, attention
from distill.methods.parts.masks import scale_masks
from distill.methods.step import Step

Build = Callable[..., Detector]
TakeStep = Callable[..., Step]
MakeMethod = Callable[..., Method]
Targets = Callable[..., Target]
NAMES = ("fitnet", "mgd", "fgd")


@pytest.mark.parametrize("place", ["backbone", "neck", "memory"])
def test_fitnet_is_the_mean_squared_error_off_the_padding(
    place: str, student: Detector, teacher: Detector, take_step: TakeStep, method: MakeMethod
) -> None:
    fitnet = method("fitnet", student, teacher, on=place, weight=2.0)
    step = take_step(student, teacher, [fitnet])
    ours, theirs = step.student_memory, step.teacher_memory
    assert theirs is not None
    sizes = [h * w for h, w in ours.shapes]
    valid = [~p for p in ours.padding.split(sizes, 1)]
    assert not valid[0].all()
    if place == "backbone":
        errors = [
            (a - b).square().flatten(2).transpose(1, 2)
            for a, b in zip(ours.features, theirs.features, strict=True)
        ]
    else:
        a, b = (m.tokens if place == "memory" else m.layers[0] for m in (ours, theirs))
        errors = list((a - b).square().split(sizes, 1))
    expected = torch.stack([e[v].mean() for e, v in zip(errors, valid, strict=False)]).mean()
    torch.testing.assert_close(fitnet.losses(step)["fitnet/features"], 2 * expected)


def test_mgd_hides_cells_and_generates_the_rest(
    student: Detector, teacher: Detector, take_step: TakeStep, method: MakeMethod
) -> None:
    mgd = method("mgd", student, teacher, weight=1.0)
    step = take_step(student, teacher, [mgd])
    seen: list[torch.Tensor] = []
    for generator in mgd.generators:
        generator.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
        # A generator that answers zero makes the loss the teacher's squared norm.
        generator[2].weight.data.zero_()
        generator[2].bias.data.zero_()
    loss = mgd.losses(step)["mgd/features"]
    assert step.teacher_memory is not None
    tokens = step.teacher_memory.tokens[~step.student_memory.padding]
    torch.testing.assert_close(loss, tokens.square().sum() / 2, rtol=1e-4, atol=1e-3)
    hidden = torch.cat([(x == 0).all(1).flatten() for x in seen]).float().mean()
    assert 0.5 < hidden < 0.8  # 0.65 in the mean
    # A hidden cell is hidden in all channels.
    assert all(((x == 0).all(1) == (x == 0).any(1)).all() for x in seen)


def test_mgd_without_hiding_passes_the_whole_map(
    student: Detector, teacher: Detector, take_step: TakeStep, method: MakeMethod
) -> None:
    mgd = method("mgd", student, teacher, dropped=0.0)
    step = take_step(student, teacher, [mgd])
    seen: list[torch.Tensor] = []
    mgd.generators[0].register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
    mgd.losses(step)
    height, width = step.student_memory.shapes[0]
    tokens = step.student_memory.tokens[:, : height * width]
    torch.testing.assert_close(seen[0].flatten(2).transpose(1, 2), tokens)


def test_attention_by_hand() -> None:
    maps = torch.tensor([[[[2.0, 0.0, 9.0]], [[-2.0, 0.0, 9.0]]]])  # two channels, three cells
    valid = torch.tensor([[[[True, True, False]]]])
    space, channel = attention(maps, valid, 1.0)
    # Mean strengths 2 and 0: softmax (e^2, 1) / (e^2 + 1), times two valid cells.
    high = torch.tensor(2.0).sigmoid()
    torch.testing.assert_close(space, 2 * torch.stack([high, 1 - high, torch.tensor(0.0)])[None])
    torch.testing.assert_close(channel, torch.ones(1, 2))


def test_fgd_by_its_formulas(
    student: Detector, teacher: Detector, take_step: TakeStep, method: MakeMethod
) -> None:
    ones = {"foreground": 1.0, "background": 1.0, "attention": 1.0, "relation": 1.0}
    fgd = method("fgd", student, teacher, **ones)
    step = take_step(student, teacher, [fgd])
    losses = fgd.losses(step)
    ours, theirs = step.student_memory, step.teacher_memory
    assert theirs is not None
    masks = [m.split([h * w for h, w in ours.shapes], 1) for m in scale_masks(step.targets, ours)]
    expected = dict.fromkeys(ones, 0.0)
    start = 0
    for level, (height, width) in enumerate(ours.shapes):
        cells = slice(start, start + height * width)
        start += height * width
        for image in range(2):
            keep = ~ours.padding[image, cells]
            s, t = ours.tokens[image, cells][keep], theirs.tokens[image, cells][keep]
            space = [len(x) * (x.abs().mean(1) / 0.5).softmax(0) for x in (s, t)]
            channel = [32 * (x.abs().mean(0) / 0.5).softmax(0) for x in (s, t)]
            error = ((s - t).square() * channel[1]).sum(1) * space[1]
            for name, mask in zip(("foreground", "background"), masks, strict=True):
                expected[name] += float((error * mask[level][image][keep]).sum().detach()) / 2
            expected["attention"] += float((space[0] - space[1]).abs().sum()) / 2
            expected["attention"] += float((channel[0] - channel[1]).abs().sum()) / 2
            # The global blocks start as the identity.
            expected["relation"] += float((s - t).square().sum()) / 2
    for name, value in expected.items():
        assert losses[f"fgd/{name}"].item() == pytest.approx(value, rel=1e-4)


def test_context_block_adds_one_vector_to_every_cell_and_ignores_padding() -> None:
    torch.manual_seed(0)
    block = GcBlock(4)
    maps, valid = torch.randn(1, 4, 2, 3), torch.ones(1, 1, 2, 3, dtype=torch.bool)
    torch.testing.assert_close(block(maps, valid), maps)
    torch.nn.init.normal_(block.transform[-1].weight)
    valid[..., 2] = False
    added = block(maps, valid) - maps
    torch.testing.assert_close(added, added[..., :1, :1].expand_as(added))
    other = maps.clone()
    other[..., 2] += 5
    torch.testing.assert_close(block(other, valid) - other, added)


@pytest.mark.parametrize("name", ["fitnet", "fgd"])
@pytest.mark.parametrize("place", ["backbone", "neck", "memory"])
def test_an_equal_student_has_nothing_to_learn(
    name: str, place: str, build: Build, take_step: TakeStep, method: MakeMethod
) -> None:
    teacher = build(seed=3).eval()
    student = copy.deepcopy(teacher)
    tested = method(name, student, teacher, on=place)
    for value in tested.losses(take_step(student, teacher, [tested])).values():
        assert abs(value.item()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", ["backbone", "neck", "memory"])
def test_gradients_empty_images_and_other_channels(
    name: str, place: str, build: Build, take_step: TakeStep, method: MakeMethod, target: Targets
) -> None:
    teacher = build(seed=1, neck={"levels": 4}).eval()
    channels = {"channels": [8, 16, 24, 32]}
    backbone = BackboneConfig(name="test_resnet", strides=(16,), options=channels)
    student = build(seed=2, width=16, neck={"levels": 2}, backbone=backbone).train()
    tested = method(name, student, teacher, on=place)
    for targets in (None, [target([], [])] * 2):
        student.zero_grad()
        losses = tested.losses(take_step(student, teacher, [tested], targets))
        total = torch.stack(list(losses.values())).sum()
        assert total.isfinite() and total > 0
        total.backward()
        assert all(p.grad is None for p in teacher.parameters())
        assert any(p.grad is not None and p.grad.any() for p in student.backbone.parameters())
        assert all(p.grad is None for p in student.decoder.parameters())
    pairs = {"backbone": 1, "neck": 2, "memory": 2}[place]
    assert sum("maps.align" in n and "weight" in n for n, _ in tested.named_parameters()) == pairs


def test_backbones_that_share_no_map_are_refused(build: Build, method: MakeMethod) -> None:
    near = build(backbone=BackboneConfig(name="test_resnet", strides=(8,)), neck={"levels": 2})
    far = build(backbone=BackboneConfig(name="test_resnet", strides=(16,)), neck={"levels": 1})
    method("fitnet", near, far, on="memory")
    with pytest.raises(UserError) as error:
        method("fitnet", near, far, on="backbone")
    assert error.value.code == "method-levels"
