"""The hybrid encoder: padding, positions, odd canvases, fusing."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from detr.config import DetectorConfig
from detr.models import build_detector
from detr.models.convolutions import RepVGGBlock
from detr.models.encoders.hybrid import HybridEncoder
from detr.models.extract import extract_layers
from detr.models.fusing import fused
from detr.models.queries.position import cell_positions
from detr.models.structures import Levels

Small = Callable[..., DetectorConfig]


def test_positions_count_rows_and_columns_of_the_canvas() -> None:
    height, width, channels = 3, 5, 16
    (table,) = cell_positions(((height, width),), channels, 100.0, -1.0, torch.zeros(1))
    assert table.shape == (1, height * width, channels)
    for row in range(height):
        for column in range(width):
            wanted = [
                turn(number / 100.0 ** (i / 4))
                for number in (row, column)
                for turn in (math.sin, math.cos)
                for i in range(4)
            ]
            found = table[0, row * width + column].tolist()
            assert found == pytest.approx(wanted, abs=1e-6)


def test_the_attention_never_sees_the_padding(small_preset: Small) -> None:
    """What lies in the padding of the coarsest map changes nothing inside the image."""
    torch.manual_seed(0)
    encoder = build_detector(small_preset("rtdetr", **{"encoder.layers": 2})).encoder.eval()
    assert isinstance(encoder, HybridEncoder)
    shapes = ((8, 16), (4, 8), (2, 4))
    maps = [torch.randn(1, 32, *shape) for shape in shapes]
    ratios = torch.tensor([[[0.5, 1.0]] * 3])  # the right half is padding
    padding = torch.cat([(torch.arange(w).expand(h, w) >= w // 2).flatten() for h, w in shapes])[
        None
    ]
    with torch.no_grad():
        before = encoder._attend(Levels(maps, padding, ratios))[-1]
        maps[-1][..., 2:] += 5.0
        after = encoder._attend(Levels(maps, padding, ratios))[-1]
    inside = ~padding[0, -8:]
    torch.testing.assert_close(after[:, inside], before[:, inside])
    assert (after - before)[:, ~inside].abs().max() > 0.1


@pytest.mark.parametrize("backbone", ["test_resnet", "convnext_atto"])
def test_any_canvas_and_any_backbone(backbone: str, small_preset: Small) -> None:
    """A backbone that drops cells at an odd edge has maps that are no halves of each other."""
    options = {"dims": (8, 16, 32, 32), "depths": (1, 1, 1, 1)} if "conv" in backbone else {}
    config = small_preset("rtdetr", backbone={"name": backbone, "options": options})
    detector = build_detector(config).eval()
    size = (101, 167)
    valid = torch.tensor([[101.0, 167.0]])
    with torch.no_grad():
        memory = detector.encode(torch.randn(1, 3, *size), valid)
        boxes, scores, _ = detector(torch.randn(1, 3, *size), valid, valid)
    halves = all(
        math.ceil(fine / 2) == coarse and math.ceil(wide / 2) == narrow
        for (fine, wide), (coarse, narrow) in pairwise(memory.shapes)
    )
    assert halves or backbone != "test_resnet"
    assert memory.tokens.shape[1] == sum(h * w for h, w in memory.shapes)
    assert boxes.isfinite().all() and scores.isfinite().all()


def test_fused_convolutions_compute_the_same(small_preset: Small) -> None:
    torch.manual_seed(0)
    config = small_preset("rtdetr", **{"encoder.width": 48, "encoder.expansion": 0.75})
    detector = build_detector(config)
    assert detector.facts.neck_width == 48
    detector.encode(torch.randn(2, 3, 64, 96), torch.tensor([[64.0, 96.0]] * 2))  # statistics
    detector.eval()
    with torch.no_grad():
        for name, x in detector.named_parameters():
            if "norm" in name:
                x.add_(0.2 * torch.randn_like(x))
    before = {name: x.clone() for name, x in detector.state_dict().items()}
    joined = fused(detector)
    images, valid = torch.randn(2, 3, 64, 96), torch.tensor([[64.0, 96.0], [64.0, 50.0]])
    with torch.no_grad():
        wanted, found = (x.encode(images, valid).tokens for x in (detector, joined))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    blocks = [m for m in joined.modules() if isinstance(m, RepVGGBlock)]
    assert len(blocks) == 12 and all(block.small is None for block in blocks)
    assert not any("norm.running" in name for name in joined.encoder.state_dict())
    assert all(torch.equal(x, before[name]) for name, x in detector.state_dict().items())


def test_layers_are_cut_out_like_any_others(small_preset: Small) -> None:
    torch.manual_seed(0)
    teacher = build_detector(small_preset("rtdetr", **{"decoder.layers": 3})).eval()
    student = extract_layers(teacher, decoder=[0, 2])
    images, valid = torch.randn(1, 3, 64, 96), torch.tensor([[64.0, 96.0]])
    with torch.no_grad():
        ours, theirs = (x.encode(images, valid).tokens for x in (student, teacher))
    assert student.config.decoder.layers == 2 and student.config.encoder.layers == 1
    torch.testing.assert_close(ours, theirs)
