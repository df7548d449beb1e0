"""DINOv3 with its adapter: places on any canvas, padding unseen, maps of three strides."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional

from detr.config import Dinov3BackboneConfig
from detr.models.backbones.dinov3 import Dinov3

SHAPE: dict[str, Any] = {
    "width": 24,
    "heads": 3,
    "taps": (1, 2, 3),
    "ffn": 32,
    "registers": 2,
    "first_scale": 0.5,
    "detail": 4,
}
KINDS = {
    "dinov3": Dinov3BackboneConfig(**SHAPE),
    "gated": Dinov3BackboneConfig(**SHAPE, activation="swiglu"),
    "distilled": Dinov3BackboneConfig(
        **{**SHAPE, "registers": 0, "first_scale": None}, final_norm=False
    ),
}


def backbone(config: Dinov3BackboneConfig) -> Dinov3:
    """Evaluated, with weights that tell places and channels apart."""
    torch.manual_seed(0)
    made = Dinov3(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def image(height: int, width: int) -> Tensor:
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(1))


def turned(x: Tensor, rows: int, columns: int) -> Tensor:
    """Channels of one head of all cells ``[H * W, C]``, pair by pair, in plain words."""
    quarter = x.shape[1] // 4
    out = x.clone()
    for cell in range(rows * columns):
        place = (cell // columns + 0.5) / rows, (cell % columns + 0.5) / columns
        for axis in range(2):
            for i in range(quarter):
                angle = 2 * math.pi * (2 * place[axis] - 1) / 100 ** (2 * i / (2 * quarter))
                first, second = axis * quarter + i, (axis + 2) * quarter + i
                a, b = x[cell, first], x[cell, second]
                out[cell, first] = a * math.cos(angle) - b * math.sin(angle)
                out[cell, second] = b * math.cos(angle) + a * math.sin(angle)
    return out


def alone(vit: Dinov3, block: Any, tokens: Tensor, rows: int, columns: int) -> Tensor:
    """A block over the tokens ``[T, C]`` of one image that fills its canvas."""
    placeless = len(vit.first_tokens)
    parts = block.query_key_value(block.norm(tokens)).chunk(3, -1)
    found = []
    for query, key, value in zip(*(x.chunk(vit.config.heads, -1) for x in parts), strict=True):
        query, key = (
            torch.cat((x[:placeless], turned(x[placeless:], rows, columns))) for x in (query, key)
        )
        found.append((query @ key.T / query.shape[-1] ** 0.5).softmax(-1) @ value)
    update = block.output(torch.cat(found, -1))
    tokens = tokens + (update if block.scale is None else block.scale * update)
    hidden = block.expand(block.ffn_norm(tokens))
    if vit.config.activation == "swiglu":
        gate, other = hidden.chunk(2, -1)
        hidden = functional.silu(gate) * other
    else:
        hidden = functional.gelu(hidden)
    update = block.contract(hidden)
    return tokens + (update if block.ffn_scale is None else block.ffn_scale * update)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("canvas", [(64, 64), (32, 96)])
@torch.no_grad()
def test_places_are_right_at_any_aspect(kind: str, canvas: tuple[int, int]) -> None:
    vit = backbone(KINDS[kind])
    pixels = image(*canvas)
    found = vit(pixels, torch.tensor([canvas]).float())
    rows, columns = (size // 16 for size in canvas)
    tokens = torch.cat((vit.first_tokens, vit.embed(pixels)[0].flatten(1).T))
    details = vit.adapter(pixels)
    for i, block in enumerate(vit.blocks):
        tokens = alone(vit, block, tokens, rows, columns)
        shown = tokens if vit.final_norm is None else vit.final_norm(tokens)
        cells = shown[len(vit.first_tokens) :].T.reshape(1, -1, rows, columns)
        sized = functional.interpolate(cells, scale_factor=2.0 ** (1 - i), mode="bilinear")
        torch.testing.assert_close(
            found[i], torch.cat((sized, details[i]), 1), atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_padding_is_not_looked_at(kind: str) -> None:
    vit = backbone(KINDS[kind])
    pixels, valid = image(96, 160), torch.tensor([[32.0, 64.0]])
    other = pixels.clone()
    # One cell beyond the image stays, which convolutions and resizing see at its edge.
    other[:, :, 64:] = 5.0
    other[:, :, :, 96:] = -5.0
    for stride, one, same in zip(
        vit.config.strides, vit(pixels, valid), vit(other, valid), strict=True
    ):
        rows, columns = 32 // stride, 64 // stride
        torch.testing.assert_close(one[..., :rows, :columns], same[..., :rows, :columns])
        assert (one - same).abs().max() > 1e-2


@torch.no_grad()
def test_a_canvas_of_broken_cells_is_filled_up_and_cut() -> None:
    vit = backbone(KINDS["dinov3"])
    found = vit(image(75, 130), torch.tensor([[75.0, 130.0]]))
    assert [tuple(x.shape[-2:]) for x in found] == [(10, 17), (5, 9), (3, 5)]
    assert all(x.isfinite().all() for x in found)


def test_what_cannot_be_is_told() -> None:
    with pytest.raises(ValidationError, match="multiple of 4 channels in a head"):
        Dinov3BackboneConfig(width=30, heads=5)
    with pytest.raises(ValidationError, match="name each once, first ones first"):
        Dinov3BackboneConfig(taps=(3, 2, 12))
