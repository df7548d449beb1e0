"""The detector as a whole: shapes, learning, padding, refinement, size."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from detr.errors import UserError
from detr.models import build_detector, parameters
from detr.presets import preset

ALL = ["plain", "refine", "two_stage", "dino", "dino_shared"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ALL)
def test_detections_are_sorted_and_inside_the_image(kind, make, batch):
    with torch.no_grad():
        boxes, scores, labels = make(kind)(*batch)
    assert boxes.shape == (2, 20, 4)
    assert scores.shape == labels.shape == (2, 20)
    assert labels.dtype == torch.int64
    assert labels.min() >= 0 and labels.max() < 3
    assert (scores[:, :-1] >= scores[:, 1:]).all()
    height, width = batch[2].T[:, :, None]
    assert (boxes >= 0).all()
    assert (boxes[..., 0::2] <= width[..., None]).all()
    assert (boxes[..., 1::2] <= height[..., None]).all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ALL)
def test_forward_equals_the_three_steps(kind, make, batch):
    detector = make(kind)
    with torch.no_grad():
        memory = detector.encode(*batch[:2])
        output = detector.decode(memory, detector.queries(memory))[0]
        boxes, scores, labels = detector(*batch)
    flat = output.logits[-1].sigmoid().flatten(1)
    torch.testing.assert_close(scores, flat.sort(descending=True).values[:, :20])
    best = flat[0].argmax()
    assert labels[0, 0] == best % 3
    cx, cy, w, h = output.boxes[-1][0, best // 3]
    expected = torch.stack((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2))
    expected = expected.clamp(0, 1) * torch.tensor([260.0, 160.0, 260.0, 160.0])
    torch.testing.assert_close(boxes[0, 0], expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["refine", "dino"])
def test_half_precision_stays_close(kind, make, batch, targets):
    detector = make(kind)
    with torch.no_grad():
        exact = detector(*batch)[1]
        with torch.autocast("cpu", torch.bfloat16):
            rough = detector(*batch)[1]
    torch.testing.assert_close(rough.float(), exact, atol=0.05, rtol=0.05)
    detector.train()
    with torch.autocast("cpu", torch.bfloat16):
        memory = detector.encode(*batch[:2])
        outputs = detector.decode(memory, detector.queries(memory, targets))
    sum(o.logits[-1].sum() + o.boxes[-1].sum() for o in outputs).backward()
    assert all(p.grad.isfinite().all() for p in detector.parameters() if p.grad is not None)


def test_output_structure(make, batch):
    detector = make("dino", **{"encoder.layers": 1, "decoder.layers": 3})
    memory = detector.encode(*batch[:2])
    assert memory.shapes == ((12, 20), (6, 10), (3, 5), (2, 3))
    assert memory.tokens.shape == memory.positions.shape == (2, 321, 32)
    assert len(memory.layers) == 2
    assert len(memory.features) == 3
    output = detector.decode(memory, detector.queries(memory), attention=True)[0]
    for name in ("logits", "boxes", "hidden", "references", "attention"):
        assert len(getattr(output, name)) == 3
    assert output.group.proposals.boxes.shape == (2, 12, 4)
    for sampled in output.attention:
        assert sampled.weights.shape == (2, 12, 4, 4, 4)
        torch.testing.assert_close(sampled.weights.sum((-1, -2)), torch.ones(2, 12, 4))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("encoder_layers", [0, 2])
def test_a_gradient_step_lowers_the_loss_and_reaches_every_parameter(
    kind, encoder_layers, make, batch, targets
):
    detector = make(kind, **{"encoder.layers": encoder_layers}).train()
    detector.backbone.eval()  # batch norm over two images is too noisy for one step
    generators = [torch.Generator(), torch.Generator()]

    def loss() -> torch.Tensor:
        memory = detector.encode(*batch[:2])
        groups = detector.queries(memory, targets, [g.manual_seed(0) for g in generators])
        total = torch.zeros(())
        for output in detector.decode(memory, groups):
            for logits, boxes in zip(output.logits, output.boxes, strict=True):
                total = total + nn.functional.softplus(logits).mean()
                total = total + (boxes - 0.4).abs().mean()
        proposals = groups[0].proposals
        if proposals is not None:
            total = total + nn.functional.softplus(proposals.logits).mean()
            total = total + (proposals.boxes - 0.4).abs().mean()
        return total

    optimizer = torch.optim.SGD(detector.parameters(), lr=1e-3)
    before = loss()
    before.backward()
    idle = [name for name, p in detector.named_parameters() if p.grad is None]
    assert idle == []
    optimizer.step()
    assert loss() < before


class _Features(nn.Module):
    """A backbone that answers with given maps, zero padded to the canvas."""

    def __init__(self, maps: list[torch.Tensor], canvas: tuple[int, int]) -> None:
        super().__init__()
        self.maps = [
            nn.functional.pad(x, (0, canvas[1] // s - x.shape[-1], 0, canvas[0] // s - x.shape[-2]))
            for x, s in zip(maps, (8, 16, 32), strict=True)
        ]

    def forward(self, images: torch.Tensor, valid: torch.Tensor) -> list[torch.Tensor]:
        return self.maps


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "refine", "two_stage", "dino"])
@pytest.mark.parametrize("offset", [0.0, -0.5])
def test_a_larger_canvas_changes_nothing(kind, offset, make):
    """Convolutions and group norm see the padding, so they are taken out of the comparison."""
    detector = make(kind, **{"positions.offset": offset})
    for projection in detector.neck.projections:
        projection[1] = nn.Identity()
    maps = [torch.randn(1, c, 128 // s, 192 // s) for c, s in ((16, 8), (32, 16), (32, 32))]
    results = []
    for canvas in ((128, 192), (192, 448)):
        detector.backbone = _Features(maps, canvas)
        with torch.no_grad():
            memory = detector.encode(torch.zeros(1, 3, *canvas), torch.tensor([[128.0, 192.0]]))
            groups = detector.queries(memory)
            results.append(detector.decode(memory, groups)[0])
    if kind == "dino":  # the position of a DINO query is the one on the canvas, so it does change
        torch.testing.assert_close(results[0].references[0], results[1].references[0])
        return
    for small, large in zip(results[0].boxes, results[1].boxes, strict=True):
        torch.testing.assert_close(small, large, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(results[0].logits[-1], results[1].logits[-1], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_look_forward_twice_reaches_the_head_before(make, batch):
    def head_grad(refine: str) -> torch.Tensor | None:
        detector = make("dino", **{"decoder.refinement": {"kind": refine}})
        memory = detector.encode(*batch[:2])
        output = detector.decode(memory, detector.queries(memory))[0]
        output.boxes[1].sum().backward()
        assert not output.references[1].requires_grad
        first = detector.decoder.box_heads[0].layers[-1].weight.grad
        return first

    assert head_grad("detach") is None
    grad = head_grad("look_forward_twice")
    assert grad is not None and grad.abs().sum() > 0


def test_mixed_boxes_use_normed_output_and_references_the_unnormed(make, batch):
    detector = make("dino")
    decoder = detector.decoder
    with torch.no_grad():
        memory = detector.encode(*batch[:2])
        output = detector.decode(memory, detector.queries(memory))[0]
        ref = output.references[0]
        logit = torch.log(ref / (1 - ref))
        box = (decoder.box_heads[0](decoder.norm(output.hidden[0])) + logit).sigmoid()
        following = (decoder.box_heads[0](output.hidden[0]) + logit).sigmoid()
    torch.testing.assert_close(output.boxes[0], box, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output.references[1], following, atol=1e-4, rtol=1e-4)


def test_plain_keeps_its_reference_and_refine_moves_it(make, batch):
    with torch.no_grad():
        for kind, moves in (("plain", False), ("refine", True)):
            detector = make(kind)
            memory = detector.encode(*batch[:2])
            output = detector.decode(memory, detector.queries(memory))[0]
            assert output.references[0].shape[-1] == 2
            if moves:
                torch.testing.assert_close(output.references[1], output.boxes[0])
            else:
                torch.testing.assert_close(output.references[1], output.references[0])


def test_first_boxes_start_where_the_paper_says(make, batch):
    with torch.no_grad():
        for kind, size in (("plain", -2.0), ("refine", -2.0)):
            detector = make(kind, jitter=False)
            memory = detector.encode(*batch[:2])
            output = detector.decode(memory, detector.queries(memory))[0]
            expected = torch.tensor(size).sigmoid().expand(2, 12, 2)
            for boxes in output.boxes:
                torch.testing.assert_close(boxes[..., 2:], expected)
            torch.testing.assert_close(
                output.boxes[-1][..., :2], output.references[0][..., :2], atol=1e-4, rtol=1e-4
            )
            assert output.logits[0].sigmoid().mean() < 0.05


def test_proposals_avoid_padding_and_borders(make, batch):
    detector = make("dino", **{"queries.number": 60})
    with torch.no_grad():
        memory = detector.encode(*batch[:2])
        proposals = detector.queries(memory)[0].proposals
    assert not memory.padding.gather(1, proposals.indices).any()
    # Each proposal is a distinct token, best class first.
    assert all(len(set(row.tolist())) == 60 for row in proposals.indices)
    best = proposals.logits.amax(-1)
    assert (best[:, :-1] >= best[:, 1:]).all()


def test_two_stage_ranks_by_the_first_class(make, batch):
    detector = make("two_stage")
    with torch.no_grad():
        proposals = detector.queries(detector.encode(*batch[:2]))[0].proposals
    assert proposals.class_agnostic
    assert (proposals.logits[:, :-1, 0] >= proposals.logits[:, 1:, 0]).all()


def test_a_canvas_with_too_few_tokens_is_refused(make):
    detector = make("dino", **{"queries.number": 30})
    with pytest.raises(UserError, match="fewer than queries: 30") as caught:
        detector(torch.zeros(1, 3, 32, 32), torch.full((1, 2), 32.0), torch.full((1, 2), 32.0))
    assert caught.value.code == "too-few-tokens"


def test_a_narrow_group_norm_keeps_eight_channels(make):
    assert make("plain").neck.projections[0][1].num_groups == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("dino-r18", 31e6),
        ("dino-r50", 47e6),
        ("dino-r101", 66e6),
        ("deformable-detr-r18", 24e6),
        ("deformable-detr-r50", 40e6),
        ("deformable-detr-r101", 59e6),
    ],
)
def test_parameter_counts_are_the_published_ones(name, published):
    with torch.device("meta"):
        detector = build_detector(preset(name, 7), pretrained=False)
    counts = parameters(detector)
    assert counts["total"] == pytest.approx(published, rel=0.02)
    assert counts["total"] == sum(p.numel() for p in detector.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"encoder": {"kind": "dense", "layers": 1, "ffn": 64, "scaled_positions": True}},
        {"decoder.cross_attention": {"kind": "conditional"}, "decoder.refinement.kind": "none"},
        {
            "queries": {"kind": "anchors", "number": 6, "learned_content": False, "patterns": 2},
        },
        {"queries.reference": "mlp"},
    ],
    ids=["dense encoder", "conditional decoder", "patterns, sampled", "mlp reference"],
)
def test_parts_go_together_as_no_family_has_them(changes, make, batch):
    one_map = {"backbone.strides": (32,), "neck.levels": 1}
    detector = make("refine", **one_map, **changes)
    memory = detector.encode(*batch[:2])
    output = detector.decode(memory, detector.queries(memory))[0]
    sum(x.sum() for x in (*output.logits, *output.boxes)).backward()
    assert all(x.isfinite().all() for x in (*output.logits, *output.boxes))
    assert [name for name, p in detector.named_parameters() if p.grad is None] == []
    with torch.no_grad():
        assert detector(*batch)[0].shape == (2, 20, 4)


def test_memory_as_maps_and_back(make, batch):
    with torch.no_grad():
        memory = make("plain").encode(*batch[:2])
    levels = memory.levels()
    assert levels.shapes == memory.shapes
    assert [tuple(x.shape[-2:]) for x in levels.maps] == list(memory.shapes)
    assert torch.equal(levels.tokens(), memory.tokens)


@pytest.mark.slow
def test_forward_exports_with_a_dynamic_batch(make, batch):
    detector = make("dino")
    dynamic = torch.export.Dim("batch", min=1, max=8)
    program = torch.export.export(detector, batch, dynamic_shapes=[{0: dynamic}] * 3, strict=False)
    three = tuple(torch.cat((x, x[:1])) for x in batch)
    with torch.no_grad():
        for got, want in zip(program.module()(*three), detector(*three), strict=True):
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
