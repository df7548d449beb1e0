"""Smaller detectors within a detector, and the copies that are cut out of it."""

from __future__ import annotations

import pytest
import torch

from detr.errors import UserError
from detr.models import build_detector
from detr.models.extract import extract_layers
from detr.models.share import FirstRows, within
from detr.presets import FAMILIES

KINDS = ["plain", "refine", "two_stage", "dino", "dino_shared"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_view_is_what_is_cut_out(kind, make, batch):
    whole = make(kind, **{"encoder.layers": 3, "decoder.layers": 3})
    view = within(whole, 1, 2, 7)
    copy = extract_layers(whole, [0], [0, 1], 7)
    assert view.config == copy.config and view.facts == copy.facts
    assert (view.facts.num_queries, view.facts.encoder_layers) == (7, 1)
    with torch.no_grad():
        for got, want in zip(view(*batch), copy(*batch), strict=True):
            assert torch.equal(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_view_of_every_family_is_what_is_cut_out(family, small_preset):
    torch.manual_seed(0)
    config = small_preset(family, **{"encoder.layers": 2, "decoder.layers": 3})
    whole = build_detector(config).eval()
    encoder = min(1, config.encoder.layers) if config.encoder.nested else config.encoder.layers
    queries = config.queries.number - 2
    view = within(whole, encoder, 2, queries)
    copy = extract_layers(whole, range(encoder), [0, 1], queries)
    images, valid = torch.randn(1, 3, 64, 96), torch.tensor([[64.0, 90.0]])
    with torch.no_grad():
        ours, theirs = view(images, valid, valid), copy(images, valid, valid)
    assert all(torch.equal(got, want) for got, want in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("kind", ["plain", "dino"])
def test_a_view_trains_the_whole(kind, make, batch, targets):
    whole = make(kind, **{"encoder.layers": 2, "decoder.layers": 2}).train()
    view = within(whole, 1, 1, 5)
    assert view.training
    memory = view.encode(*batch[:2])
    (output, *_) = view.decode(memory, view.queries(memory, targets, None, 3))
    output.logits[-1].sum().backward()
    reached = {name for name, p in whole.named_parameters() if p.grad is not None}
    assert any(name.startswith("encoder.layers.0.") for name in reached)
    left = ("encoder.layers.1.", "decoder.layers.1.")
    assert not any(name.startswith(left) for name in reached)
    table = whole.source.embedding if kind == "plain" else whole.source.content
    rows = table.weight.grad.abs().sum(1) > 0
    assert rows[:5].any() and not rows[5:].any()


def test_weights_of_the_whole_that_move_are_the_views(make, batch):
    whole = make("dino")
    view, cut = within(whole, 1, 1, 5), extract_layers(whole, [0], [0], 5)
    assert isinstance(view.source.content, FirstRows)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.mul_(0.9)
        assert not torch.equal(view(*batch)[1], cut(*batch)[1])
        assert torch.equal(view(*batch)[1], extract_layers(whole, [0], [0], 5)(*batch)[1])


def test_statistics_and_frozen_parts_are_shared(make, batch):
    whole = make("dino").train()
    whole.freeze("encoder")
    view = within(whole, 1, 1, 5)
    assert not view.encoder.training and view.decoder.training
    buffers = dict(whole.named_buffers())
    assert buffers and all(b is buffers[name] for name, b in view.named_buffers())


@pytest.mark.parametrize("queries", [0, 13])
def test_queries_the_teacher_lacks_are_refused(queries, make):
    with pytest.raises(UserError, match="keep 1 to 12") as caught:
        extract_layers(make("dino"), None, None, queries)
    assert caught.value.code == "extract-queries"
