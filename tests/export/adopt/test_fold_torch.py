"""Attention written in torch as detectors' repositories write it, through both of its exporters."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from engines.msda_function import is_attention, node_points, set_lowering
from export.adopt.fold import fold_attention
from export.adopt.prepare import static, to_known_opset

SHAPES, HEADS, WIDTH, QUERIES = ((5, 7), (3, 4), (2, 2)), 2, 8, 6


class Sampled(nn.Module):
    """Deformable attention of queries with a box each.

    Args:
        points: Of each level.
        in_a_row: Samples of all levels lie on one axis, as in RT-DETRv2 and D-FINE; otherwise each
            level has an axis of its own, as in Deformable DETR, RT-DETR and LW-DETR.
        projected: Values and output are projected; D-FINE's are not.
        reversed_map: Values come as ``[B, M, D, S]`` (RF-DETR's and LW-DETR's deployed form).
    """

    def __init__(
        self, points: tuple[int, ...], in_a_row: bool, projected: bool, reversed_map: bool
    ) -> None:
        super().__init__()
        self.points, self.in_a_row, self.reversed_map = points, in_a_row, reversed_map
        self.offsets = nn.Linear(WIDTH, HEADS * sum(points) * 2)
        self.shares = nn.Linear(WIDTH, HEADS * sum(points))
        self.value = nn.Linear(WIDTH, WIDTH) if projected else nn.Identity()
        self.output = nn.Linear(WIDTH, WIDTH) if projected else nn.Identity()

    def forward(self, queries: Tensor, boxes: Tensor, tokens: Tensor) -> Tensor:
        batch, count = queries.shape[:2]
        total, levels = sum(self.points), len(SHAPES)
        shares = self.shares(queries).view(batch, count, HEADS, total).softmax(-1)
        if self.in_a_row:
            step = torch.tensor([1 / n for n in self.points for _ in range(n)])[:, None]
            offsets = self.offsets(queries).view(batch, count, HEADS, total, 2) * step
            where = boxes[:, :, None, None, :2] + offsets * boxes[:, :, None, None, 2:] * 0.5
            grids = (2 * where - 1).permute(0, 2, 1, 3, 4).flatten(0, 1)
            parts = list(grids.split(self.points, dim=2))
        else:
            sizes = (batch, count, HEADS, levels, self.points[0], 2)
            offsets = self.offsets(queries).view(sizes) / self.points[0]
            middle, extent = (x[:, :, None, None, None] for x in boxes.split(2, -1))
            grids = 2 * (middle + offsets * extent * 0.5) - 1
            parts = [grids[:, :, :, i].transpose(1, 2).flatten(0, 1) for i in range(levels)]
        value = self.value(tokens)
        if self.reversed_map:
            by_head = value.transpose(1, 2).reshape(batch * HEADS, WIDTH // HEADS, -1)
        else:
            by_head = value.view(batch, -1, HEADS, WIDTH // HEADS).permute(0, 2, 3, 1).flatten(0, 1)
        maps = by_head.split([h * w for h, w in SHAPES], dim=-1)
        samples = [
            functional.grid_sample(
                m.reshape(batch * HEADS, WIDTH // HEADS, *size), grid, align_corners=False
            )
            for m, size, grid in zip(maps, SHAPES, parts, strict=True)
        ]
        joined = torch.cat(samples, -1) if self.in_a_row else torch.stack(samples, -2).flatten(-2)
        weights = shares.transpose(1, 2).reshape(batch * HEADS, 1, count, total)
        summed = (joined * weights).sum(-1).view(batch, WIDTH, count)
        return self.output(summed.transpose(1, 2).contiguous())


PATTERNS: dict[str, Sampled] = {
    "rt-detr": Sampled((4, 4, 4), False, True, False),
    "rt-detr-v2": Sampled((4, 4, 4), True, True, False),
    "d-fine": Sampled((3, 6, 3), True, False, False),
    "lw-detr": Sampled((2, 2, 2), False, True, True),
}


@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript", "dynamo"])
@pytest.mark.parametrize("name", PATTERNS)
def test_each_way_of_writing_it_becomes_one_node(name: str, dynamo: bool) -> None:
    torch.manual_seed(0)
    tokens = sum(h * w for h, w in SHAPES)
    inputs = (
        torch.randn(1, QUERIES, WIDTH),
        torch.rand(1, QUERIES, 4),
        torch.randn(1, tokens, WIDTH),
    )
    names = ["queries", "boxes", "tokens"]
    file = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            PATTERNS[name].eval(),
            inputs,
            None if dynamo else file,
            input_names=names,
            output_names=["out"],
            dynamic_axes=None if dynamo else {one: {0: "N"} for one in names},
            opset_version=18 if dynamo else 16,
            dynamo=dynamo,
            verbose=False,
        )
    model = program.model_proto if program is not None else onnx.load_from_string(file.getvalue())
    place = Path("theirs.onnx")
    shapes = {one: tuple(x.shape) for one, x in zip(names, inputs, strict=True)}
    folded = fold_attention(static(to_known_opset(model, place), shapes, place))
    assert folded.left == () and len(folded.folds) == 1
    points = PATTERNS[name].points
    unequal = None if len(set(points)) == 1 else points
    assert [node_points(n) for n in folded.model.graph.node if is_attention(n)] == [unequal]
    set_lowering(folded.model, folded.folds[0].head, "gather")
    assert b"GridSample" not in folded.model.SerializeToString()
    feed = {one: x.numpy() for one, x in zip(names, inputs, strict=True)}
    options = ort.SessionOptions()
    options.log_severity_level = 3
    found = ort.InferenceSession(folded.model.SerializeToString(), options).run(None, feed)[0]
    np.testing.assert_allclose(found, PATTERNS[name](*inputs).detach(), atol=2e-6)
