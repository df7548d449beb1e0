"""A group of queries never changes another group's output."""

from __future__ import annotations

import pytest
import torch

from detr.models import QueryGroup
from detr.models.attention.deformable import group_spans


def _extra(role: str, detector, batch_size: int, size: int = 7, **changes) -> QueryGroup:
    generator = torch.Generator().manual_seed(sum(role.encode()))
    return QueryGroup(
        role=role,
        content=torch.randn(batch_size, size, detector.config.width, generator=generator),
        reference=torch.rand(batch_size, size, 4, generator=generator) * 0.6 + 0.2,
        **changes,
    )


def _same(a, b, rows=slice(None)) -> None:
    for name in ("logits", "boxes", "hidden", "references"):
        for x, y in zip(getattr(a, name), getattr(b, name), strict=True):
            assert x.isfinite().all()
            torch.testing.assert_close(x[:, rows], y[:, rows], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "refine", "two_stage", "dino"])
def test_groups_are_independent(kind, make, batch, targets):
    detector = make(kind).train()
    detector.backbone.eval()
    with torch.no_grad():
        memory = detector.encode(*batch[:2])
        own = detector.queries(
            memory, targets, [torch.Generator().manual_seed(3 + i) for i in range(2)]
        )
        assert [g.role for g in own] == (["own", "denoising"] if kind == "dino" else ["own"])
        padding = torch.zeros(2, 7, dtype=torch.bool)
        padding[0, 4:] = True
        padding[1] = True  # a group that is filler only in one image must not become NaN
        further = [
            _extra("general", detector, 2),
            _extra("target_aware", detector, 2, padding=padding),
            _extra("blocks", detector, 2, size=8, blocks=2),
        ]
        alone = detector.decode(memory, own[:1])[0]
        together = detector.decode(memory, [*own, *further])
        _same(alone, together[0])
        for group, output in zip(further, together[len(own) :], strict=True):
            _same(detector.decode(memory, [group])[0], output)
        reordered = detector.decode(memory, [*further, *reversed(own)])
        _same(alone, reordered[-1])
        if kind == "dino":
            _same(together[1], reordered[-2])


def test_filler_queries_do_not_reach_the_others(make, batch):
    detector = make("dino")
    with torch.no_grad():
        memory = detector.encode(*batch[:2])
        padding = torch.tensor([[False] * 4 + [True] * 3] * 2)
        group = _extra("padded", detector, 2, padding=padding)
        short = QueryGroup("short", group.content[:, :4], group.reference[:, :4])
        _same(detector.decode(memory, [short])[0], detector.decode(memory, [group])[0], slice(0, 4))


def test_denoising_blocks_see_own_queries_but_not_each_other(make, batch, targets):
    detector = make("dino").train()
    detector.backbone.eval()
    with torch.no_grad():
        memory = detector.encode(*batch[:2])
        own, denoising = detector.queries(memory, targets)
        assert denoising.blocks == 2
        assert denoising.denoising.size == 6
        before = detector.decode(memory, [own, denoising])[1]
        denoising.content = denoising.content.clone()
        denoising.content[:, :6] += 1
        after = detector.decode(memory, [own, denoising])[1]
        _same(before, after, slice(6, 12))
        assert not torch.allclose(before.logits[-1][:, :6], after.logits[-1][:, :6], atol=1e-3)
        own.content = own.content + 1
        moved = detector.decode(memory, [own, denoising])[1]
        assert not torch.allclose(after.logits[-1][0], moved.logits[-1][0], atol=1e-4)


def test_spans_refuse_impossible_groups(make):
    detector = make("dino")
    one = _extra("one", detector, 1)
    with pytest.raises(ValueError, match="two query groups"):
        group_spans([one, one])
    with pytest.raises(ValueError, match="not in the call"):
        group_spans([_extra("lonely", detector, 1, sees="own")])
    with pytest.raises(ValueError, match="equal blocks"):
        group_spans([_extra("uneven", detector, 1, blocks=2)])


def test_two_and_four_dimensional_references_mix(make, batch):
    detector = make("plain")
    with torch.no_grad():
        memory = detector.encode(*batch[:2])
        own = detector.queries(memory)[0]
        assert own.reference.shape[-1] == 2
        outputs = detector.decode(memory, [own, _extra("boxes", detector, 2)], attention=True)
        alone = detector.decode(memory, [own], attention=True)[0]
    for a, b in zip(alone.attention, outputs[0].attention, strict=True):
        torch.testing.assert_close(a.locations, b.locations)
        torch.testing.assert_close(a.weights, b.weights)
    assert outputs[1].attention[0].locations.shape == (2, 7, 4, 4, 4, 2)
