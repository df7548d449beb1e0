"""Sine embeddings of the image plane and of query references."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from detr.config import PositionsConfig
from detr.models.structures import LevelShapes

TWO_PI = 2 * math.pi
QUERY_TEMPERATURE = 10000.0
# Orders in which the coordinates of a reference are laid out.
YXWH = (1, 0, 2, 3)
XYWH = (0, 1, 2, 3)


def sine(values: Tensor, width: int, temperature: float) -> Tensor:
    """Sine and cosine pairs of ``values`` (radians at the highest frequency).

    Args:
        values: ``[...]``.
        width: Even number of channels; channel 2i is the sine and 2i+1 the cosine of
            ``value / temperature ** (2i / width)`` (Vaswani et al. 2017).
        temperature: Ratio of the lowest to the highest wavelength.

    Returns:
        ``[..., width]``.
    """
    exponent = torch.arange(width // 2, device=values.device, dtype=torch.float32) * (2 / width)
    angles = values[..., None] / temperature**exponent
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(-2)


def image_positions(
    ratios: Tensor, shapes: LevelShapes, width: int, temperature: float, offset: float
) -> list[Tensor]:
    """2-D sine position of every token, y in the first half of the channels, x in the second.

    Counts cells from 1 and divides by the number of cells the image covers, so the last valid cell
    is at ``2 pi`` (``offset`` -0.5 moves it to the cell's center). Cells in the padding repeat the
    last valid one.

    Args:
        ratios: ``[B, V, 2]`` valid ratios (width, height).
        shapes: (height, width) of the levels.
        width: Channels D, a multiple of 4.
        temperature: Of :func:`sine`; DETR 10000, DINO 20.
        offset: Added to the cell number; Deformable DETR -0.5, DETR and DINO 0.

    Returns:
        Per level ``[B, H_v * W_v, D]``.
    """
    embeddings = []
    for level, (height, wide) in enumerate(shapes):
        axes = []
        for axis, size in ((1, height), (0, wide)):
            cells = ratios[:, level, axis, None] * size
            number = torch.arange(1, size + 1, device=ratios.device, dtype=ratios.dtype)[None]
            number = torch.minimum(number, cells) + offset
            axes.append(sine(number / (cells + 1e-6) * TWO_PI, width // 2, temperature))
        y = axes[0][:, :, None].expand(-1, -1, wide, -1)
        x = axes[1][:, None].expand(-1, height, -1, -1)
        embeddings.append(torch.cat((y, x), -1).flatten(1, 2))
    return embeddings


def cell_positions(
    shapes: LevelShapes, width: int, temperature: float, offset: float, like: Tensor
) -> list[Tensor]:
    """2-D sine position of every token by its cell's number alone (RT-DETR).

    Laid out as sine of y, cosine of y, sine of x, cosine of x. What is computed is one table per
    axis, so a map of any aspect has the positions of its own rows and columns; RT-DETR's own code
    counts along the wrong axis where a map is not square.

    Args:
        shapes: (height, width) of the levels.
        width: Channels D, a multiple of 4.
        temperature: Ratio of the lowest to the highest wavelength.
        offset: Added to the cell number, which counts from 1; RT-DETR -1.
        like: Tells device and type.

    Returns:
        Per level ``[1, H_v * W_v, D]``.
    """
    quarter = width // 4
    exponent = torch.arange(quarter, device=like.device, dtype=torch.float32) / quarter
    embeddings = []
    for height, wide in shapes:
        axes = []
        for size in (height, wide):
            number = torch.arange(1, size + 1, device=like.device, dtype=torch.float32) + offset
            angles = number[:, None] / temperature**exponent
            axes.append(torch.cat((angles.sin(), angles.cos()), -1).to(like.dtype))
        y = axes[0][:, None].expand(-1, wide, -1)
        x = axes[1][None].expand(height, -1, -1)
        embeddings.append(torch.cat((y, x), -1).flatten(0, 1)[None])
    return embeddings


def token_positions(
    config: PositionsConfig, ratios: Tensor, shapes: LevelShapes, width: int
) -> list[Tensor]:
    """Position of every token, per level ``[B or 1, H_v * W_v, D]``.

    Args:
        config: Of the image plane.
        ratios: ``[B, V, 2]`` valid ratios (width, height).
        shapes: (height, width) of the levels.
        width: Channels D.
    """
    if config.normalized:
        return image_positions(ratios, shapes, width, config.temperature, config.offset)
    return cell_positions(shapes, width, config.temperature, config.offset, ratios)


def reference_embedding(
    reference: Tensor, order: Sequence[int], width: int, temperature: float = QUERY_TEMPERATURE
) -> Tensor:
    """Sine embedding of references, ``width`` channels per coordinate.

    Args:
        reference: ``[..., R]`` in [0, 1].
        order: Coordinates in the order they are laid out: y x w h is the field's habit; Deformable
            DETR's proposals use x y w h.
        width: Channels per coordinate.
        temperature: Of :func:`sine`.

    Returns:
        ``[..., len(order) * width]``.
    """
    ordered = torch.cat([reference[..., i : i + 1] for i in order], -1)
    return sine(ordered * TWO_PI, width, temperature).flatten(-2)
