"""Vision transformers: windows on any canvas, positions stretched over it, padding unseen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from detr.config import Dinov2BackboneConfig, VitBackboneConfig, WindowedVitConfig
from detr.models.backbones.bicubic import bicubic_weights
from detr.models.backbones.vit import VisionTransformer

SHAPE: dict[str, Any] = {
    "patch": 4,
    "width": 24,
    "heads": 3,
    "side": 5,
    "windows": 2,
    "windowed": (0, 2),
    "taps": (1, 3),
}
KINDS = {"vit": VitBackboneConfig(**SHAPE), "dinov2": Dinov2BackboneConfig(**SHAPE)}


def backbone(config: WindowedVitConfig) -> VisionTransformer:
    """Evaluated, with weights that tell places and channels apart."""
    torch.manual_seed(0)
    made = VisionTransformer(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def image(height: int, width: int) -> Tensor:
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(5, 5), (26, 14), (84, 14), (3, 14), (40, 37)])
def test_bicubic_weights_are_torchs(outputs: int, inputs: int, antialias: bool) -> None:
    unit = torch.eye(inputs, dtype=torch.float64)[None, None]
    wanted = functional.interpolate(
        unit, (outputs, inputs), mode="bicubic", align_corners=False, antialias=antialias
    )[0, 0]
    found = torch.tensor(bicubic_weights(outputs, inputs, antialias), dtype=torch.float64)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


def directly(vit: VisionTransformer, pixels: Tensor) -> list[Tensor]:
    """The maps of one image that fills its canvas, window by window and in plain words."""
    config = vit.config
    cells = vit.embed(pixels)[0]
    height, width = cells.shape[1:]
    stretched = functional.interpolate(
        vit.positions.permute(2, 0, 1)[None],
        (height, width),
        mode="bicubic",
        align_corners=False,
        antialias=config.antialias,
    )[0]
    tokens = (cells + stretched).permute(1, 2, 0)  # [H, W, C]
    # Window sides round up: at the right and bottom windows are smaller.
    tall, broad = -(-height // config.windows), -(-width // config.windows)
    places = [
        (slice(y * tall, (y + 1) * tall), slice(x * broad, (x + 1) * broad))
        for y in range(config.windows)
        for x in range(config.windows)
    ]
    windows = [tokens[place].flatten(0, 1) for place in places]
    first = 0
    if vit.class_token is not None:
        windows = [torch.cat((vit.class_token[None], w)) for w in windows]
        first = 1
    maps = []
    for number, block in enumerate(vit.blocks):
        if number in config.windowed:
            windows = [alone(block, w) for w in windows]
        else:
            joined = alone(block, torch.cat(windows))
            windows = list(joined.split([len(w) for w in windows]))
        if number + 1 in config.taps:
            whole = torch.empty(height, width, config.width)
            for place, window in zip(places, windows, strict=True):
                shown = window if vit.final_norm is None else vit.final_norm(window)
                whole[place] = shown[first:].view_as(whole[place])
            maps.append(whole.permute(2, 0, 1)[None])
    return maps


def alone(block: Any, tokens: Tensor) -> Tensor:
    """A block over tokens ``[T, C]`` that all see each other."""
    seen = block.norm(tokens)
    parts = block.query_key_value(seen).chunk(3, -1)
    query, key, value = (x.unflatten(-1, (block.heads, -1)).transpose(0, 1) for x in parts)
    weights = (query @ key.transpose(1, 2) / query.shape[-1] ** 0.5).softmax(-1)
    tokens = tokens + block.scale * block.output((weights @ value).transpose(0, 1).flatten(1))
    hidden = functional.gelu(block.expand(block.ffn_norm(tokens)))
    return tokens + block.ffn_scale * block.contract(hidden)


# (height, width) in pixels: square; wide as KITTI is; high; with windows that come out uneven.
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("canvas", [(32, 32), (24, 80), (80, 24), (20, 44)])
@torch.no_grad()
def test_windows_are_right_at_any_aspect(kind: str, canvas: tuple[int, int]) -> None:
    vit = backbone(KINDS[kind])
    pixels = image(*canvas)
    found = vit(pixels, torch.tensor([canvas]).float())
    for one, wanted in zip(found, directly(vit, pixels), strict=True):
        torch.testing.assert_close(one, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_padding_is_not_looked_at(kind: str) -> None:
    vit = backbone(KINDS[kind])
    # Of four windows one is cut by the image's edge and two lie beyond it.
    pixels, valid = image(32, 48), torch.tensor([[15.0, 37.0]])
    other = pixels.clone()
    other[:, :, 16:] = 5.0
    other[:, :, :, 40:] = -5.0
    for one, same in zip(vit(pixels, valid), vit(other, valid), strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one[..., :4, :10], same[..., :4, :10])
        assert (one - same).abs().max() > 1e-2


@torch.no_grad()
def test_a_canvas_of_broken_cells_is_filled_up() -> None:
    vit = backbone(KINDS["vit"])
    pixels = image(30, 45)
    whole = functional.pad(pixels, (0, 3, 0, 2))
    valid = torch.tensor([[30.0, 45.0]])
    for one, wanted in zip(vit(pixels, valid), vit(whole, valid), strict=True):
        assert one.shape[-2:] == (8, 12)
        torch.testing.assert_close(one, wanted)
