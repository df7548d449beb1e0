"""Losses and costs of masks beside loops over pixels and torch's own sampling."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from detr.models import PixelMap, Target, build_detector
from detr.presets import preset
from distill.losses.costs import MatchingCosts
from distill.losses.detection import detection_losses
from distill.losses.masks import (
    MaskPredictions,
    Points,
    mask_losses,
    mask_terms,
    sampled,
    sampled_masks,
    uncertain_points,
)
from distill.losses.matcher import match
from distill.losses.matches import Matches
from distill.losses.weights import LossWeights
from tests.models.heads.test_masks import mask_dino, with_masks

CANVAS = (32, 40)


def generators(count=2):
    return [torch.Generator().manual_seed(i) for i in range(count)]


def problem():
    """Two layers, two images (one narrower than the canvas), five queries, 3 and 1 objects."""
    torch.manual_seed(0)
    pixels = PixelMap(torch.randn(2, 6, 8, 10), torch.tensor([[10.0, 8.0], [7.0, 5.5]]))
    masks = [torch.rand(3, *CANVAS) > 0.5, torch.rand(1, *CANVAS) > 0.5]
    masks[1][:, 22:] = False
    masks[1][:, :, 28:] = False
    targets = [
        Target(torch.rand(len(m), 4), torch.zeros(len(m), dtype=torch.int64), torch.zeros(0, 4), m)
        for m in masks
    ]
    queries = torch.randn(2, 2, 5, 6, requires_grad=True)
    return MaskPredictions(queries, pixels, Points(50, generators())), targets


def test_ground_truth_is_sampled_as_torch_does():
    masks = torch.rand(3, 9, 7) > 0.4
    index = torch.tensor([2, 0, 2, 1])
    points = torch.rand(4, 300, 2)
    extent = torch.tensor([0.8, 1.0])
    wanted = sampled(masks[index].float()[:, None], points, extent)[:, 0]
    torch.testing.assert_close(sampled_masks(masks, index, points, extent), wanted)


def test_uncertain_points_lie_where_logits_are_near_zero():
    logits = torch.linspace(-4, 4, 100).expand(3, 20, 100).contiguous()
    found = uncertain_points(logits, torch.ones(2), Points(400, generators(1)), 0)
    assert found.shape == (3, 400, 2)
    middle = (found[..., 0] - 0.5).abs()
    # 300 of the 1200 drawn, the nearest to the line in the middle: an eighth on either side. Beyond
    # the map's first and last row logits fade to zero.
    away = (found[..., 1] - 0.5).abs() < 0.45
    assert middle[:, :300][away[:, :300]].max() < 0.16
    assert middle[:, 300:].max() > 0.4


def test_losses_of_one_pair_by_hand():
    masks, targets = problem()
    zero = torch.tensor([0])
    pair = Matches(zero + 1, zero, zero + 3, zero + 2)
    found = mask_losses(masks, targets, pair, torch.tensor(4.0))
    logits = torch.einsum("c,chw->hw", masks.queries[1, 0, 3], masks.pixels.embedding[0])
    places = uncertain_points(logits[None].detach(), torch.ones(2), Points(50, generators()), 0)
    grid = places[:, :, None] * 2 - 1
    goal = F.grid_sample(targets[0].masks[2][None, None].float(), grid, align_corners=False)
    told = F.grid_sample(logits[None, None], grid, align_corners=False)
    goal, told = goal.flatten(), told.flatten()
    wanted = F.binary_cross_entropy_with_logits(told, goal) / 4
    torch.testing.assert_close(found["mask"], wanted)
    p = told.sigmoid()
    wanted = (1 - (2 * (p * goal).sum() + 1) / (p.sum() + goal.sum() + 1)) / 4
    torch.testing.assert_close(found["dice"], wanted)
    found["mask"].backward()
    assert masks.queries.grad[1, 0, 3].abs().sum() > 0
    assert masks.queries.grad[0].abs().sum() == 0


def test_costs_beside_loops():
    masks, targets = problem()
    entropy, dice = mask_terms(masks, targets)
    drawn = generators()
    for image, target in enumerate(targets):
        places = torch.rand((1, 50, 2), generator=drawn[image])
        own = masks.pixels.valid[image] / torch.tensor([10.0, 8.0])
        theirs = masks.pixels.valid[image] * 4 / torch.tensor([40.0, 32.0])
        for layer in range(2):
            for query in range(5):
                logits = torch.einsum(
                    "c,chw->hw", masks.queries[layer, image, query], masks.pixels.embedding[image]
                )
                told = sampled(logits[None, None], places, own).flatten()
                for box, mask in enumerate(target.masks):
                    goal = sampled(mask[None, None].float(), places, theirs).flatten()
                    wanted = F.binary_cross_entropy_with_logits(told, goal)
                    torch.testing.assert_close(entropy[layer, image, query, box], wanted)
                    p = told.sigmoid()
                    share = (2 * (p * goal).sum() + 1) / (p.sum() + goal.sum() + 1)
                    torch.testing.assert_close(dice[layer, image, query, box], 1 - share)
    assert not entropy[:, 1, :, 1:].any()


def test_masks_decide_where_boxes_and_classes_do_not():
    torch.manual_seed(0)
    pixels = PixelMap(torch.eye(2).repeat(1, 16, 1).reshape(1, 2, 4, 8), torch.tensor([[8.0, 4.0]]))
    left = torch.zeros(1, 16, 32, dtype=torch.bool)
    # Even columns of cells belong to the first channel, odd ones to the second.
    pixels.embedding[0] = torch.tensor([1.0, -1.0]).view(2, 1, 1) * torch.tensor(
        [1.0 if x < 4 else -1.0 for x in range(8)]
    )
    left[:, :, :16] = True
    target = Target(torch.full((1, 4), 0.5), torch.zeros(1, dtype=torch.int64), torch.zeros(0, 4))
    target.masks = left
    logits, boxes = torch.zeros(1, 1, 2, 3), torch.full((1, 1, 2, 4), 0.5)
    for best in (0, 1):
        told = torch.zeros(1, 1, 2, 2)
        told[0, 0, best, 0], told[0, 0, 1 - best, 1] = 5.0, 5.0
        masks = MaskPredictions(told, pixels, Points(100, generators(1)))
        found = match(logits, boxes, [target], MatchingCosts(), masks=masks)
        assert found.query.tolist() == [best]


def losses(detector, images, valid, targets, seed=0, **changes):
    weights = LossWeights(mask_points=32, **changes)
    draws = [torch.Generator().manual_seed(seed + i) for i in range(len(targets))]
    memory = detector.encode(images, valid)
    groups = detector.queries(memory, targets, draws, 3)
    outputs = {x.group.role: x for x in detector.decode(memory, groups)}
    return detection_losses(outputs, targets, torch.tensor(3.0), weights, draws)


@pytest.fixture
def scene():
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    boxes = torch.tensor([[0.3, 0.4, 0.2, 0.2], [0.7, 0.6, 0.3, 0.5], [0.5, 0.5, 0.1, 0.1]])
    full = Target(boxes, torch.tensor([0, 1, 2]), torch.zeros(0, 4))
    none = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))
    targets = with_masks([full, none], (64, 96))
    return images, torch.tensor([[64.0, 96.0], [48.0, 80.0]]), targets


def test_every_set_has_mask_losses_and_every_parameter_learns(scene):
    detector = mask_dino()
    found = losses(detector, *scene)
    for name in ("own", "proposals", "denoising"):
        assert {f"{name}/mask", f"{name}/dice"} <= found.keys()
    sum(found.values()).backward()
    idle = [n for n, p in detector.named_parameters() if p.requires_grad and p.grad is None]
    assert idle == []


def test_a_light_head_on_dino_learns(scene):
    """Its proposals have no masks, its contrastive denoising has; negatives have none."""
    torch.manual_seed(0)
    config = preset("dino-r18", 3, pretrained=False).replace(
        width=32,
        attention_heads=4,
        backbone={"name": "test_resnet"},
        encoder={"layers": 1, "ffn": 32},
        decoder={"layers": 2, "ffn": 32},
        queries={"number": 12, "denoising": {"number": 6}},
        heads={"masks": {"width": 16, "channels": 16}},
    )
    detector = build_detector(config, pretrained=False)
    found = losses(detector, *scene)
    assert {"own/mask", "denoising/dice"} <= found.keys() and "proposals/mask" not in found
    sum(found.values()).backward()
    # Heads of every layer.
    assert len(detector.decoder.mask_heads) == 2
    for module in (detector.decoder.mask_heads, detector.pixels):
        assert all(p.grad is not None and p.grad.any() for p in module.parameters())


# What a family's own training changes of the detection loss.
LOSSES = {
    "deformable-detr": {},
    "rtdetr": {"scores": "varifocal"},
    "rtdetrv2-discrete": {"scores": "varifocal"},
    "d-fine": {"scores": "varifocal", "edges": 0.15, "box_pairs": "union"},
}


@pytest.mark.slow
@pytest.mark.parametrize("family", LOSSES)
def test_a_light_head_learns_on_other_families(family, scene, small_preset):
    """A few steps lower what masks lose, also over a hybrid encoder; all its parts move."""
    torch.manual_seed(0)
    config = small_preset(family, **{"heads.masks": {"width": 16, "channels": 16}})
    detector = build_detector(config, pretrained=False).train()
    detector.backbone.eval()
    optimizer = torch.optim.AdamW(detector.parameters(), lr=2e-3)
    course = []
    for _ in range(15):
        found = losses(detector, *scene, **LOSSES[family])
        optimizer.zero_grad()
        sum(found.values()).backward()
        optimizer.step()
        course.append(float((found["own/mask"] + found["own/dice"]).detach()))
    assert sum(course[-3:]) < 0.8 * sum(course[:3])
    for module in (detector.decoder.mask_heads, detector.pixels):
        assert all(p.grad is not None and p.grad.any() for p in module.parameters())


def test_points_follow_from_the_seeds(scene):
    detector = mask_dino()
    first, again, other = (losses(detector, *scene, seed=seed) for seed in (0, 0, 7))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["own/mask"], other["own/mask"])
    # No image without objects, and no batch without any, is a problem.
    images, valid, targets = scene
    empty = losses(detector, images[1:], valid[1:], targets[1:])
    assert empty["own/mask"] == 0 and empty["own/dice"] == 0
