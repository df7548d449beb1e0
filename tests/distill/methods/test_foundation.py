"""A foundation model teaches the encoder's coarsest map (RT-DETRv4)."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from torch.nn import functional

from detr.config import HybridEncoderConfig, NeckConfig
from detr.data.preprocess import PreprocessConfig
from detr.errors import UserError
from detr.models import Detector
from distill.methods import Method, build_methods
from distill.methods.foundation import FoundationOptions, FoundationTeacher
from distill.methods.step import Step
from distill.recipe import Recipe
from distill.teachers.foundation import open_foundation

BuildDetector = Callable[..., Detector]
TakeStep = Callable[..., Step]
TINY = "test_vit"  # timm's: 64 channels, patches of 16


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny vision transformer's weights."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("vit") / "tiny.safetensors"
    save_file(timm.create_model(TINY, num_classes=0).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DINOv2 with registers as the transformers library keeps it."""
    torch.manual_seed(4)
    path = tmp_path_factory.mktemp("dinov2")
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14,
        num_register_tokens=3,
    )  # fmt: skip
    transformers.Dinov2WithRegistersModel(config).save_pretrained(path)
    return path


def hybrid(build: BuildDetector) -> Detector:
    """A student whose encoder attends within the coarsest map, in a width of its own."""
    return build(
        seed=2,
        encoder=HybridEncoderConfig(ffn=32, width=48, layers=1),
        neck=NeckConfig(levels=3, group_norm=False, batch_norm=True),
    ).train()


def foundation(student: Detector, weights: Path, **options: Any) -> FoundationTeacher:
    given = {"model": TINY, "weights": str(weights), **options}
    method = build_methods([{"foundation": given}], student, None, steps=100)[0]
    assert isinstance(method, FoundationTeacher)
    return method


def by_hand(method: FoundationTeacher, step: Step, weights: Path) -> float:
    """The loss in loops, the teacher made anew."""
    vit = timm.create_model(TINY, num_classes=0, dynamic_img_size=True)
    vit.load_state_dict(open_foundation(TINY, str(weights), "x").body.state_dict())
    memory = step.student_memory
    height, width = memory.shapes[-1]
    tokens = memory.layers[-1][:, -height * width :]
    canvas = torch.zeros(len(step.images), 3, height * 32, width * 32)
    canvas[..., : step.images.shape[-2], : step.images.shape[-1]] = step.images
    told = vit.pretrained_cfg
    mean, std = (torch.tensor(told[key])[:, None, None] for key in ("mean", "std"))
    raw = canvas * torch.tensor([58.395, 57.12, 57.375])[:, None, None]
    raw = (raw + torch.tensor([123.675, 116.28, 103.53])[:, None, None]) / 255
    small = functional.interpolate(
        (raw - mean) / std, (height * 16, width * 16), mode="bicubic", antialias=True
    )
    with torch.no_grad():
        seen = vit.eval().forward_features(small)[:, vit.num_prefix_tokens :]
    total, count = 0.0, 0
    for i, (high, wide) in enumerate(step.valid_sizes.tolist()):
        for cell in range(height * width):
            row, column = divmod(cell, width)
            if row * 32 >= high or column * 32 >= wide:
                continue
            a, b = method.project(tokens[i, cell]).detach(), seen[i, cell]
            total += 1 - float(a @ b / a.norm() / b.norm())
            count += 1
    return total / count


@pytest.mark.parametrize("kind", ["hybrid", "deformable"])
def test_the_loss_is_one_minus_the_cosine_of_each_cell(
    kind: str, build: BuildDetector, take_step: TakeStep, weights: Path
) -> None:
    student = hybrid(build) if kind == "hybrid" else build(seed=2).train()
    method = foundation(student, weights, weight=3.0)
    assert method.project.in_features == student.facts.neck_width
    step = take_step(student, None, [method])
    loss = method.losses(step)["foundation/map"]
    expected = 3.0 * by_hand(method, step, weights)
    assert math.isclose(float(loss), expected, rel_tol=1e-4)
    loss.backward()
    moved = {n for n, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    assert any(n.startswith("encoder.layers.") for n in moved)
    assert any(n.startswith("backbone.") for n in moved)
    # The paper's place is before the maps are fused.
    assert not any(n.startswith(("encoder.top_down", "decoder.")) for n in moved)
    assert method.project.weight.grad is not None
    assert all(p.grad is None for p in method.model.body.parameters())


def test_images_of_another_normalization_look_the_same_to_it(
    build: BuildDetector, take_step: TakeStep, weights: Path
) -> None:
    student = hybrid(build)
    unit = PreprocessConfig(size=(64, 96), mean=(0.0, 0.0, 0.0), std=(255.0, 255.0, 255.0))
    step = take_step(student, None, [])
    method = foundation(student, weights)
    cells = step.student_memory.shapes[-1]
    usual = method.model(step.images, cells, 32, method.given)
    raw = step.images * torch.tensor(method.given.std)[:, None, None]
    raw = raw + torch.tensor(method.given.mean)[:, None, None]
    torch.testing.assert_close(method.model(raw / 255, cells, 32, unit), usual)
    assert usual.shape == (2, cells[0] * cells[1], 64) and not usual.requires_grad


def test_the_transformers_library_gives_patches_alone(folder: Path) -> None:
    found = open_foundation(f"hf:{folder}", None, "x")
    assert (found.patch, found.width) == (14, 32)
    images = torch.randn(2, 3, 64, 96)
    given = PreprocessConfig(size=(64, 96))
    seen = found(images, (2, 3), 32, given)
    assert seen.shape == (2, 6, 32)
    with torch.no_grad():
        scaled = functional.interpolate(images, (28, 42), mode="bicubic", antialias=True)
        own = found.body(pixel_values=scaled).last_hidden_state[:, 1 + 3 :]
    torch.testing.assert_close(seen, own, atol=1e-4, rtol=1e-4)


def test_the_weight_follows_the_share_of_gradients(build: BuildDetector, weights: Path) -> None:
    method = foundation(hybrid(build), weights, gradient_share=0.2, tolerance=0.05)
    assert method.changed(4.0, 0.2) == method.changed(4.0, 0.24) == 4.0
    # Odds of 0.1 are to become those of 0.25, the nearer end.
    assert method.changed(4.0, 0.1) == pytest.approx(4.0 * (0.25 / 0.75) / (0.1 / 0.9))
    # Too much: the other end.
    assert method.changed(4.0, 0.5) == pytest.approx(4.0 * (0.15 / 0.85) / (0.5 / 0.5))
    assert method.changed(4.0, 1e-4) == 40.0
    assert method.changed(4.0, 0.0) == 20.0


def test_the_share_is_a_mean_over_steps_and_ends(
    build: BuildDetector, take_step: TakeStep, weights: Path
) -> None:
    student = hybrid(build)
    options = {"gradient_share": 0.2, "tolerance": 0.05, "every": 3, "until": 0.5, "weight": 4.0}
    method = foundation(student, weights, **options)
    shares = []
    for index in range(3):
        step = take_step(student, None, [method], seed=index, index=index)
        student.zero_grad()
        loss = torch.stack(list(method.losses(step).values())).sum()
        (loss + 1e-2 * step.student_outputs["own"].logits[-1].square().sum()).backward()
        sums = {
            n: float(p.grad.abs().sum())
            for n, p in student.named_parameters()
            if p.grad is not None
        }
        inside = sum(x for n, x in sums.items() if n.startswith("encoder.layers."))
        shares.append(inside / sum(sums.values()))
        assert float(method._weight(index)) == 4.0
        method.after_step(step)
    assert len({round(share, 6) for share in shares}) == 3
    expected = method.changed(4.0, sum(shares) / 3)
    assert float(method._weight(3)) == pytest.approx(expected, rel=1e-4)
    assert float(method._weight(50)) == 20.0 and float(method._weight(49)) != 20.0
    # All of it goes into a checkpoint, and none of the foundation model.
    state = method.state_dict()
    assert set(state) == {"project.weight", "project.bias", "strength", "share", "counted"}
    other = foundation(student, weights, **options)
    other.load_state_dict(state)
    assert float(other._weight(3)) == float(method._weight(3))


def test_without_a_share_the_weight_stays(
    build: BuildDetector, take_step: TakeStep, weights: Path
) -> None:
    student = hybrid(build)
    method = foundation(student, weights, gradient_share=None, weight=2.0)
    method.after_step(take_step(student, None, [method]))
    assert int(method.counted) == 0 and float(method._weight(99)) == 2.0


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ({"model": "no-such-vit"}, "foundation-unknown", "timm has no model 'no-such-vit'"),
        ({"model": "test_resnet"}, "foundation-unknown", "no plain vision transformer"),
        ({"model": "hf:/nowhere"}, "foundation-weights", "/nowhere"),
        ({"model": TINY, "weights": "/nowhere.safetensors"}, "checkpoint-missing", "/nowhere"),
        ({"model": "hf:x", "weights": "y"}, "foundation-weights", "brings its own"),
    ],
)
def test_what_cannot_teach_is_refused_in_one_line(
    options: dict[str, str], code: str, words: str, build: BuildDetector
) -> None:
    with pytest.raises(UserError, match=words) as caught:
        build_methods([{"foundation": options}], hybrid(build), None)
    assert caught.value.code == code and "\n" not in caught.value.message


def test_weights_nobody_has_are_refused(
    build: BuildDetector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline, or a model of which no weights are published."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def offline(*_: object, **__: object) -> None:
        raise OSError("cannot reach the hub\nand more lines")

    student = hybrid(build)
    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError, match="offline, give a file: weights") as caught:
        build_methods([{"foundation": {"model": TINY}}], student, None)
    assert caught.value.code == "foundation-weights" and "\n" not in caught.value.message


def test_a_folder_that_lacks_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    tensors.pop("layernorm.weight")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(UserError, match=r"lacks layernorm\.weight"):
        open_foundation(f"hf:{tmp_path}", None, "x")


def test_an_encoder_without_layers_has_no_share(build: BuildDetector, weights: Path) -> None:
    bare = build(seed=2, **{"encoder.layers": 0, "heads": {}})
    with pytest.raises(UserError, match="set gradient_share to null"):
        foundation(bare, weights)
    assert isinstance(foundation(bare, weights, gradient_share=None), Method)


def test_options_that_leave_no_room_are_refused() -> None:
    with pytest.raises(ValueError, match="leaves 0 to 1"):
        FoundationOptions(model="x", gradient_share=0.005)


def test_a_recipe_needs_no_teacher_for_it() -> None:
    recipe = Recipe.model_validate(
        {
            "name": "x",
            "data": {"train": "coco:x"},
            "input": {"size": [64, 96]},
            "detector": {"preset": "rtdetr-r18"},
            "methods": [{"foundation": {"model": TINY}}],
            "steps": 1,
        }
    )
    assert not recipe.needs_teacher
