"""Masks are products of queries and pixels; what follows from them, beside loops."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from detr.config import DetectorConfig
from detr.models import PixelMap, Target, build_detector
from detr.models.extract import extract_layers
from detr.models.heads.masks import boxes_of, mask_quality, within
from detr.presets import FAMILIES, preset

MASKS = {"heads.masks": {"width": 16}}


def mask_dino(**changes):
    torch.manual_seed(0)
    config = preset("mask-dino-r18", 3, pretrained=False).replace(
        width=32,
        attention_heads=4,
        backbone={"name": "test_resnet"},
        encoder={"layers": 1, "ffn": 32},
        decoder={"layers": 2, "ffn": 32},
        queries={"number": 12, "denoising": {"number": 7}},
        heads={"masks": {"width": 16}},
        detections=10,
    )
    return build_detector(config.replace(**changes), pretrained=False)


def with_masks(targets, canvas):
    """Rectangles for boxes."""
    for target in targets:
        target.masks = torch.zeros(len(target.labels), *canvas, dtype=torch.bool)
        target.masks[:, 10:40, 20:60] = True
    return targets


@pytest.mark.parametrize("kind", ["plain", "refine", "two_stage", "dino"])
def test_any_detector_can_have_masks(kind, make, batch):
    images, valid, original = batch
    plain, masked = make(kind), make(kind, **MASKS)
    shared = plain.state_dict().keys() & masked.state_dict().keys()
    assert shared == plain.state_dict().keys()
    masked.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        boxes = plain(images, valid, original)
        found = masked(images, valid, original)
    for a, b in zip(boxes, found, strict=False):
        assert torch.equal(a, b)
    assert found[3].shape == (*found[1].shape, 24, 40)
    # The backbone's map of stride 4 is the pixels' alone.
    assert masked.facts == replace(plain.facts, masks=True)
    assert masked.offers - plain.offers == {"masks"}


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"mask-dino", "stable-mask-dino"}))
def test_every_family_can_have_masks(family, small_preset):
    """The encoder's finest map may have any stride and come from a hybrid encoder."""
    torch.manual_seed(0)
    config = small_preset(family)
    plain = build_detector(config).eval()
    masked = build_detector(config.replace(**MASKS)).eval()
    masked.load_state_dict(plain.state_dict(), strict=False)
    images, sizes = torch.randn(1, 3, 64, 96), torch.tensor([[50.0, 96.0]])
    with torch.no_grad():
        wanted, found = plain(images, sizes, sizes), masked(images, sizes, sizes)
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=False))
    assert len(wanted) == 3 and found[3].shape == (*found[1].shape, 16, 24)


def test_masks_are_those_of_the_queries_chosen(make, batch):
    images, valid, original = batch
    detector = make("dino", **MASKS)
    with torch.no_grad():
        memory = detector.encode(images, valid)
        (own,) = detector.decode(memory, detector.queries(memory))
        boxes, _, _, masks = detector(images, valid, original)
    every = own.mask_logits()
    scale = original.flip(-1).repeat(1, 2)[:, None]
    center, half = own.boxes[-1][..., :2], own.boxes[-1][..., 2:] / 2
    corners = torch.cat((center - half, center + half), -1) * scale
    corners = torch.minimum(corners.clamp(min=0), scale)
    for image in range(2):
        for box, mask in zip(boxes[image], masks[image], strict=True):
            (query,) = torch.isclose(corners[image], box, atol=1e-4).all(-1).nonzero()[:1, 0]
            torch.testing.assert_close(mask, every[image, query], atol=1e-5, rtol=1e-5)


def pixels_of(valid, height=6, width=8):
    return PixelMap(torch.zeros(len(valid), 1, height, width), torch.tensor(valid))


def test_boxes_of_masks_by_hand():
    logits = torch.full((1, 3, 6, 8), -1.0)
    logits[0, 0, 2:4, 1:5] = 1
    logits[0, 1, 5, 7] = 1  # in the padding alone
    pixels = pixels_of([[7.0, 5.0]])
    whole = boxes_of(logits, pixels, whole_cells=True)
    wanted = torch.tensor([(1 + 5) / 2 / 7, (2 + 4) / 2 / 5, 4 / 7, 2 / 5])
    torch.testing.assert_close(whole[0, 0], wanted)
    numbers = boxes_of(logits, pixels, whole_cells=False)
    wanted = torch.tensor([(1 + 4) / 2 / 7, (2 + 3) / 2 / 5, 3 / 7, 1 / 5])
    torch.testing.assert_close(numbers[0, 0], wanted)
    for empty in (1, 2):
        assert whole[0, empty].tolist() == [0, 0, 0, 0]
        assert numbers[0, empty].tolist() == [1, 1, 0, 0]


def test_quality_is_the_mean_probability_within():
    logits = torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    logits[1, 2] = -1
    pixels = pixels_of([[8.0, 6.0], [3.5, 4.0]])
    found = mask_quality(logits, pixels)
    assert within(pixels)[1].sum() == 4 * 4  # a cell counts if its first pixel is in the image
    for image, (height, width) in enumerate(((6, 8), (4, 4))):
        for n in range(3):
            part = logits[image, n, :height, :width]
            inside = part[part > 0].sigmoid()
            wanted = inside.mean() if len(inside) else torch.tensor(0.0)
            torch.testing.assert_close(found[image, n], wanted, atol=1e-5, rtol=0)


def test_scores_weighed_by_masks_stay_in_order(batch):
    images, valid, original = batch
    detector = mask_dino().eval()
    with torch.no_grad():
        boxes, scores, labels, masks = detector(images, valid, original)
        plain = copy.deepcopy(detector)
        plain.config = detector.config.replace(**{"heads.masks.weigh_scores": False})
        bare = plain(images, valid, original)
    assert (scores.diff(dim=1) <= 0).all()
    assert (scores <= bare[1].amax()).all()
    assert boxes.shape == bare[0].shape and masks.shape == bare[3].shape
    assert labels.sort().values.equal(bare[2].sort().values)


def test_the_heads_are_the_decoders(batch):
    detector = mask_dino()
    copied = copy.deepcopy(detector)
    assert copied.source._heads.classes is copied.decoder.class_heads[0]
    assert copied.source._heads.masks is not detector.source._heads.masks
    names = [name for name, _ in detector.named_parameters()]
    assert len([name for name in names if "class_head" in name]) == 2
    images, valid, _ = batch
    with torch.no_grad():
        group = detector.queries(detector.encode(images, valid))[0]
    proposals = group.proposals
    assert torch.equal(group.content, proposals.tokens)
    wanted = detector.decoder.class_heads[0](detector.decoder.norm(proposals.tokens))
    torch.testing.assert_close(proposals.logits, wanted)


def test_first_answers_are_given_in_training_alone(batch, targets):
    images, valid, _ = batch
    detector = mask_dino()
    wanted = with_masks(targets, images.shape[-2:])
    memory = detector.encode(images, valid)
    own, noisy = detector.decode(memory, detector.queries(memory, wanted))
    assert noisy.group.denoising.groups == 2  # 7 // 3
    assert noisy.initial.masks.shape == noisy.masks[0].shape
    assert torch.equal(own.initial.boxes, own.group.reference)
    detector.eval()
    with torch.no_grad():
        memory = detector.encode(images, valid)
        (own,) = detector.decode(memory, detector.queries(memory))
    assert own.initial is None


def test_more_objects_than_the_budget_are_not_denoised(batch):
    images, valid, _ = batch
    detector = mask_dino(**{"queries.denoising.number": 2})
    crowd = Target(torch.rand(3, 4) / 2 + 0.2, torch.zeros(3, dtype=torch.int64), torch.zeros(0, 4))
    memory = detector.encode(images, valid)
    assert [g.role for g in detector.queries(memory, [crowd, crowd])] == ["own"]


def test_a_shallower_detector_keeps_its_masks(batch):
    images, valid, original = batch
    detector = mask_dino().eval()
    smaller = extract_layers(detector, decoder=[0, 1])
    with torch.no_grad():
        for a, b in zip(
            detector(images, valid, original), smaller(images, valid, original), strict=True
        ):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"decoder.norm_twice": True}, "set final_norm to true"),
        ({"queries": {"kind": "unified", "initial_boxes": "predicted"}}, "by the decoder's heads"),
        (
            {
                "queries": {"kind": "unified"},
                "decoder": {
                    "final_norm": True,
                    "refinement": {"kind": "look_forward_twice", "shared_heads": True},
                },
            },
            "start from masks and need heads.masks",
        ),
    ],
)
def test_what_cannot_go_together_is_refused(changes, reason):
    base = DetectorConfig(num_classes=3).replace(**{"decoder.refinement": {"kind": "detach"}})
    with pytest.raises(ValidationError, match=reason):
        base.replace(**changes)
