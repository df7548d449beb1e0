"""Denoising, plain (DN-DETR) and contrastive (DINO): layout, noise bounds, who sees whom."""

from __future__ import annotations

import pytest
import torch

from detr.config import ContrastiveDenoisingConfig, PlainDenoisingConfig
from detr.models import QueryGroup, Target, build_detector, cxcywh_to_xyxy
from detr.models.attention.deformable import GroupedSelfAttention, group_spans, split_heads
from detr.models.queries.denoising import ContrastiveDenoiser, PlainDenoiser
from detr.presets import preset


def _target(*boxes: tuple[float, float, float, float]) -> Target:
    labels = torch.arange(len(boxes)) % 3
    return Target(torch.tensor(boxes).view(-1, 4), labels, torch.zeros(0, 4))


BOXES = [(0.5, 0.5, 0.2, 0.1), (0.4, 0.6, 0.1, 0.3), (0.6, 0.4, 0.2, 0.2)]


def _denoiser(contrastive=True, **config):
    if contrastive:
        return ContrastiveDenoiser(ContrastiveDenoisingConfig(**config), num_classes=3, width=8)
    return PlainDenoiser(PlainDenoisingConfig(**config), num_classes=3, width=8)


def _group(targets, seed=0, **config):
    torch.manual_seed(5)
    denoiser = _denoiser(**config)
    generators = [torch.Generator().manual_seed(seed + 100 * i) for i in range(len(targets))]
    return denoiser, denoiser(targets, generators)


def test_layout_is_positives_then_negatives_per_block():
    denoiser, group = _group([_target(*BOXES), _target(BOXES[0])], number=10, label_noise=0)
    assert group.role == "denoising"
    assert group.sees == "own"
    assert (group.blocks, group.denoising.groups, group.denoising.size) == (3, 3, 6)
    assert group.content.shape == (2, 18, 8)
    assert group.reference.shape == (2, 18, 4)
    block = torch.tensor([False, True, True, False, True, True])
    assert torch.equal(group.padding[1], block.repeat(3))
    assert not group.padding[0].any()
    # Without label noise every positive and negative carries its box's own label.
    expected = denoiser.label_embedding(torch.tensor([0, 1, 2]).repeat(6))
    torch.testing.assert_close(group.content[0], expected)
    assert (group.content[1][group.padding[1]] == 0).all()


@pytest.mark.parametrize("scale", [0.4, 1.0])
def test_positives_move_less_than_half_a_size_and_negatives_more(scale):
    target = _target((0.5, 0.5, 0.2, 0.1))
    _, group = _group([target], number=400, box_noise=scale)
    corners = cxcywh_to_xyxy(group.reference[0]).view(400, 2, 4)
    half = torch.tensor([0.1, 0.05, 0.1, 0.05])
    moved = (corners - cxcywh_to_xyxy(target.boxes)).abs() / half / scale
    assert moved[:, 0].max() <= 1 + 1e-4
    assert moved[:, 0].max() > 0.95
    if scale < 0.5:  # larger noise can cross the corners of a box, which are then repaired
        assert moved[:, 1].min() >= 1 - 1e-4
        assert moved[:, 1].max() <= 2 + 1e-4
    assert group.reference.min() > 0
    assert group.reference.max() < 1


def test_negatives_need_not_be_harder():
    target = _target((0.5, 0.5, 0.2, 0.1))
    _, group = _group([target], number=400, harder_negatives=False)
    corners = cxcywh_to_xyxy(group.reference[0]).view(400, 2, 4)
    half = torch.tensor([0.1, 0.05, 0.1, 0.05])
    moved = (corners - cxcywh_to_xyxy(target.boxes)).abs() / half
    assert 0.95 < moved[:, 1].max() <= 1 + 1e-4


def test_labels_flip_as_often_as_asked():
    denoiser, group = _group([_target(BOXES[0])], number=4000, label_noise=0.25)
    own = denoiser.label_embedding.weight[0]
    changed = (group.content[0] != own).any(-1).float().mean()
    # A uniform draw hits the same class once in three.
    assert changed == pytest.approx(0.25 * 2 / 3, abs=0.02)


PLAIN = {"contrastive": False, "groups": 5, "label_noise": 0.2, "box_noise": 0.4}


@pytest.mark.parametrize(
    ("name", "noise"),
    [
        ("dn-dab-detr-r50", PlainDenoisingConfig(groups=5, label_noise=0.2, box_noise=0.4)),
        ("dn-deformable-detr-r50", PlainDenoisingConfig(groups=5, label_noise=0.2, box_noise=0.4)),
        ("dino-r50", ContrastiveDenoisingConfig(number=100, label_noise=0.25, box_noise=1.0)),
    ],
)
def test_presets_have_the_papers_noise(name, noise):
    assert preset(name, 80).queries.noise == noise


def test_plain_layout_is_every_box_once_per_group():
    quiet = {**PLAIN, "label_noise": 0, "box_noise": 0}
    denoiser, group = _group([_target(*BOXES), _target(BOXES[0])], **quiet)
    # The number of groups is fixed, whatever the crowd.
    assert (group.blocks, group.denoising.groups, group.denoising.size) == (5, 5, 3)
    torch.testing.assert_close(group.reference[0], torch.tensor(BOXES).repeat(5, 1))
    assert group.padding[1].tolist() == [False, True, True] * 5
    labels = denoiser.label_embedding(torch.tensor([0, 1, 2]).repeat(5))
    assert labels.shape[-1] == 7  # the eighth channel is the indicator
    torch.testing.assert_close(group.content[0], torch.cat((labels, torch.ones(15, 1)), -1))


def test_plain_noise_moves_a_center_by_half_the_share_it_resizes_by():
    box = (0.5, 0.5, 0.2, 0.1)
    _, group = _group([_target(box)], **{**PLAIN, "groups": 4000})
    moved = (group.reference[0] - torch.tensor(box)) / 0.4
    reach = torch.tensor([0.1, 0.05, 0.2, 0.1])
    share = moved / reach
    assert share.abs().max() <= 1 + 1e-5
    for end in (share.amin(0), share.amax(0)):
        assert (end.abs() > 0.99).all()
    # Uniform: no side is preferred, and the variance is a third of the squared reach.
    torch.testing.assert_close(share.mean(0), torch.zeros(4), atol=0.04, rtol=0)
    torch.testing.assert_close(share.var(0), torch.full((4,), 1 / 3), atol=0.02, rtol=0)


def test_plain_noise_stays_where_a_logit_can_be_taken():
    _, group = _group([_target((0.01, 0.99, 0.02, 0.02))], **{**PLAIN, "box_noise": 3.0})
    assert group.reference.min() > 0 and group.reference.max() < 1


def test_plain_labels_flip_to_any_class_but_never_to_unknown():
    denoiser, group = _group([_target(BOXES[0])], **{**PLAIN, "groups": 6000})
    near = torch.cdist(group.content[0, :, :-1], denoiser.label_embedding.weight)
    shares = torch.bincount(near.argmin(-1), minlength=4) / 6000
    expected = torch.tensor([1 - 0.2 * 2 / 3, 0.2 / 3, 0.2 / 3, 0.0])
    torch.testing.assert_close(shares, expected, atol=0.02, rtol=0)
    assert shares[3] == 0


@pytest.mark.parametrize("family", ["dn-dab-detr", "dn-deformable-detr"])
def test_own_queries_are_told_apart_by_the_last_channel(family, small_preset, targets):
    detector = build_detector(small_preset(family)).train()
    memory = detector.encode(torch.zeros(2, 3, 64, 96), torch.tensor([[64.0, 96.0]] * 2))
    own, denoising = detector.queries(memory, targets)
    assert (own.content[..., -1] == 0).all()
    assert (denoising.content[~denoising.padding][:, -1] == 1).all()
    if family == "dn-dab-detr":  # which has no learned content: an unknown label stands for it
        unknown = detector.denoiser.label_embedding.weight[3]
        assert torch.equal(own.content[..., :-1], unknown.expand(2, 12, -1))


@pytest.mark.parametrize("contrastive", [True, False])
def test_the_attention_mask_is_the_papers(contrastive):
    """Own queries see each other alone; a denoising group sees itself and the own queries."""
    torch.manual_seed(0)
    _, denoising = _group(
        [_target(*BOXES)], **({"number": 9} if contrastive else {"contrastive": False, "groups": 3})
    )
    blocks, size = denoising.blocks, denoising.denoising.size
    assert blocks == 3
    own = QueryGroup("own", torch.randn(1, 4, 8), torch.rand(1, 4, 4))
    attention = GroupedSelfAttention(8, 2, 0.0)
    hidden = torch.cat((own.content, denoising.content), 1)
    found, _ = attention(hidden, torch.zeros_like(hidden), group_spans([own, denoising]))
    group_of = torch.tensor([-1] * 4 + [i for i in range(blocks) for _ in range(size)])
    allowed = (group_of[:, None] == group_of) | (group_of == -1)
    assert not allowed[:4, 4:].any() and allowed[4:, :4].all()
    query, key = attention.query_key(hidden).chunk(2, -1)
    query, key, value = (split_heads(x, 2) for x in (query, key, attention.value(hidden)))
    scores = (query @ key.transpose(-1, -2)) / 2.0
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    expected = attention.output((weights @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(found, expected)


def test_the_budget_shrinks_with_crowded_images_but_keeps_one_block():
    _, group = _group([_target(*BOXES)], number=2)
    assert group.blocks == 1
    assert group.content.shape[1] == 6


def test_no_boxes_no_group():
    assert _group([_target(), _target()])[1] is None


def test_a_generator_makes_the_noise_repeatable_and_the_default_one_too():
    targets = [_target(*BOXES)]
    assert torch.equal(_group(targets, 1)[1].reference, _group(targets, 1)[1].reference)
    assert not torch.equal(_group(targets, 1)[1].reference, _group(targets, 2)[1].reference)
    denoiser, _ = _group(targets)
    torch.manual_seed(9)
    first = denoiser(targets)
    torch.manual_seed(9)
    assert torch.equal(first.reference, denoiser(targets).reference)


@pytest.mark.parametrize("contrastive", [True, False])
def test_an_image_gets_the_same_noise_in_every_batch(contrastive):
    crowded, sparse, empty = _target(*BOXES), _target(BOXES[0]), _target()
    torch.manual_seed(5)
    denoiser = _denoiser(**({"number": 7} if contrastive else {"contrastive": False, "groups": 7}))

    def kept(targets, seeds, most=0):
        group = denoiser(targets, [torch.Generator().manual_seed(s) for s in seeds], most)
        return [
            (group.reference[i][~group.padding[i]], group.content[i][~group.padding[i]])
            for i in range(len(targets))
        ]

    together = kept([crowded, sparse, empty], (1, 2, 3))
    # Alone, the sparse image must be told how crowded the most crowded image is.
    apart = [kept([crowded], [1])[0], kept([sparse], [2], most=3)[0], kept([empty], [3], most=3)[0]]
    for (boxes, content), (other, its) in zip(together, apart, strict=True):
        assert torch.equal(boxes, other) and torch.equal(content, its)
    assert len(together[2][0]) == 0 and len(together[1][0]) > 0


def test_a_batch_without_boxes_keeps_every_parameter_in_the_graph(make, batch):
    detector = make("dino").train()
    memory = detector.encode(*batch[:2])
    groups = detector.queries(memory, [_target(), _target()])
    assert [g.role for g in groups] == ["own"]
    detector.decode(memory, groups)[0].logits[-1].sum().backward()
    assert detector.denoiser.label_embedding.weight.grad is not None


def test_denoising_is_for_training_with_targets_only(make, batch, targets):
    detector = make("dino")
    memory = detector.encode(*batch[:2])
    assert len(detector.queries(memory, targets)) == 1
    assert len(detector.train().queries(memory)) == 1
    assert len(detector.queries(memory, targets)) == 2
