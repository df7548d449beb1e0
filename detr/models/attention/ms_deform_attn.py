"""The torch operator ``detr::ms_deform_attn``: registered when this module is imported.

One operator, so that an exported graph holds one node per attention. It runs the compiled kernels
of :mod:`detr.msda`, on the CPU and on CUDA; where there is none (no compiler at installation,
another device), the ``grid_sample`` path.

Shape legend: B batch, S tokens of all levels, M heads, D channels of a head, Q queries, V levels,
P points of a level, K samples of all levels where their numbers differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from detr import msda
from detr.models.attention import msda_cuda
from detr.models.structures import LevelShapes
from detr.msda.check import Sizes, check_like, check_sizes, dtype_name


def _pairs(spatial_shapes: Sequence[int]) -> LevelShapes:
    """(height, width) pairs of the flat list an operator can take."""
    if len(spatial_shapes) % 2:
        raise ValueError("spatial_shapes must list a height and a width per level")
    return tuple(zip(spatial_shapes[::2], spatial_shapes[1::2], strict=True))


def ms_deform_attn_reference(
    value: Tensor,
    shapes: LevelShapes,
    locations: Tensor,
    weights: Tensor,
    points: Sequence[int] | None = None,
) -> Tensor:
    """Deformable attention with ``grid_sample``: differentiable, any device, slow.

    Arguments and result as :func:`ms_deform_attn`. Half precision values are widened first, so
    coordinates and sums keep the precision of ``locations``.
    """
    sizes = check_sizes(value, shapes, locations, weights, points)
    sampled = [F.grid_sample(m, g, align_corners=False) for m, g in _maps(value, sizes, locations)]
    samples = torch.cat(sampled, dim=-1)  # [B*M, D, Q, K]
    share = weights.transpose(1, 2).flatten(0, 1).flatten(2).unsqueeze(1)  # [B*M, 1, Q, K]
    out = (
        (samples * share).sum(-1).reshape(sizes.batch, sizes.heads * sizes.channels, sizes.queries)
    )
    return out.transpose(1, 2).to(value.dtype)


def _levels(sizes: Sizes, samples: Tensor) -> tuple[Tensor, ...]:
    """Locations or weights level by level, ``[B, Q, M, P, ...]``."""
    in_a_row = samples.flatten(3, len(sizes.weights) - 1)
    return torch.split(in_a_row, list(sizes.level_points), dim=3)


def _maps(value: Tensor, sizes: Sizes, locations: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Each level as ``grid_sample`` wants it: maps ``[B*M, D, H, W]``, grid ``[B*M, Q, P, 2]``."""
    counts = [height * width for height, width in sizes.shapes]
    levels = torch.split(value.to(locations.dtype), counts, dim=1)
    for level, shape, own in zip(levels, sizes.shapes, _levels(sizes, locations), strict=True):
        maps = level.permute(0, 2, 3, 1)
        maps = maps.reshape(sizes.batch * sizes.heads, sizes.channels, *shape)
        yield maps, (2 * own - 1).transpose(1, 2).flatten(0, 1)


def _reference_backward(
    grad_out: Tensor, value: Tensor, sizes: Sizes, locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`ms_deform_attn_reference`, level by level.

    Written out because an operator's own implementation runs below autograd.
    """
    lead = (sizes.batch, sizes.heads, sizes.queries)
    gradient = grad_out.to(weights.dtype).reshape(
        sizes.batch, sizes.queries, sizes.heads, sizes.channels
    )
    gradient = gradient.permute(0, 2, 3, 1).flatten(0, 1).unsqueeze(-1)  # [B*M, D, Q, 1]
    grad_maps, grad_locations, grad_weights = [], [], []
    parts = zip(_maps(value, sizes, locations), _levels(sizes, weights), strict=True)
    for (maps, grid), weight in parts:
        share = weight.transpose(1, 2).flatten(0, 1).unsqueeze(1)  # [B*M, 1, Q, P]
        sampled = F.grid_sample(maps, grid, align_corners=False)
        grad_weights.append((sampled * gradient).sum(1))
        grad_map, grad_grid = torch.ops.aten.grid_sampler_2d_backward(
            gradient * share, maps, grid, 0, 0, False, [True, True]
        )
        grad_maps.append(grad_map.flatten(2))
        grad_locations.append(2 * grad_grid)
    return (
        torch.cat(grad_maps, 2)
        .view(sizes.batch, sizes.heads, sizes.channels, sizes.tokens)
        .permute(0, 3, 1, 2)
        .to(value.dtype),
        torch.cat(grad_locations, 2).view(*lead, *sizes.locations[3:]).transpose(1, 2),
        torch.cat(grad_weights, 2).view(*lead, *sizes.weights[3:]).transpose(1, 2),
    )


@torch.library.custom_op("detr::ms_deform_attn", mutates_args=())
def _forward(
    value: Tensor,
    spatial_shapes: Sequence[int],
    locations: Tensor,
    weights: Tensor,
    points: Sequence[int] | None = None,
) -> Tensor:
    shapes = _pairs(spatial_shapes)
    sizes = check_sizes(value, shapes, locations, weights, points)
    if value.device.type == "cpu" and msda.native_available():
        out = value.new_empty(sizes.out)
        msda.forward(value, shapes, locations, weights, out, torch.get_num_threads(), points)
        return out
    if msda_cuda.has_kernel(value, sizes):
        return msda_cuda.forward(value, sizes, locations, weights)
    return ms_deform_attn_reference(value, shapes, locations, weights, points).contiguous()


@_forward.register_fake
def _(
    value: Tensor,
    spatial_shapes: Sequence[int],
    locations: Tensor,
    weights: Tensor,
    points: Sequence[int] | None = None,
) -> Tensor:
    return value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])


@torch.library.custom_op("detr::ms_deform_attn_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    locations: Tensor,
    weights: Tensor,
    points: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = _pairs(spatial_shapes)
    sizes = check_sizes(value, shapes, locations, weights, points)
    check_like("grad_out", grad_out, sizes.out, dtype_name(value))
    if value.device.type == "cpu" and msda.native_available():
        like = torch.contiguous_format
        out = (
            torch.empty_like(value, memory_format=like),
            torch.empty_like(locations, memory_format=like),
            torch.empty_like(weights, memory_format=like),
        )
        threads = torch.get_num_threads()
        msda.backward(grad_out, value, shapes, locations, weights, out, threads, points)
        return out
    # The CUDA kernel adds up in no fixed order. grid_sample does not either, and tells those who
    # asked for deterministic algorithms.
    if not torch.are_deterministic_algorithms_enabled() and msda_cuda.has_kernel(value, sizes):
        return msda_cuda.backward(grad_out, value, sizes, locations, weights)
    grads = _reference_backward(grad_out, value, sizes, locations, weights)
    return grads[0].contiguous(), grads[1].contiguous(), grads[2].contiguous()


@_backward.register_fake
def _(
    grad_out: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    locations: Tensor,
    weights: Tensor,
    points: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    like = torch.contiguous_format
    return (
        torch.empty_like(value, memory_format=like),
        torch.empty_like(locations, memory_format=like),
        torch.empty_like(weights, memory_format=like),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, spatial_shapes, locations, weights, points = inputs
    ctx.save_for_backward(value, locations, weights)
    ctx.spatial_shapes, ctx.points = spatial_shapes, points


def _differentiate(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, Tensor, Tensor, None]:
    value, locations, weights = ctx.saved_tensors
    grad_value, grad_locations, grad_weights = _backward(
        grad_out, value, ctx.spatial_shapes, locations, weights, ctx.points
    )
    return grad_value, None, grad_locations, grad_weights, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def _coordinates(value: Tensor, tensor: Tensor) -> Tensor:
    """Locations or weights in the one precision the kernel takes for this value."""
    return tensor.to(torch.float64 if value.dtype == torch.float64 else torch.float32)


def _autocast(device: str) -> None:
    """Under autocast the value keeps its (half) type, locations and weights become float32.

    torch's own rule for custom operators would cast all three to half.
    """

    def cast(
        value: Tensor,
        spatial_shapes: Sequence[int],
        locations: Tensor,
        weights: Tensor,
        points: Sequence[int] | None = None,
    ) -> Tensor:
        with torch.autocast(device, enabled=False):
            locations, weights = _coordinates(value, locations), _coordinates(value, weights)
            result: Tensor = torch.ops.detr.ms_deform_attn(
                value, spatial_shapes, locations, weights, points
            )
            return result

    key = f"Autocast{device.upper()}"
    _LIBRARY.impl("ms_deform_attn", cast, key)  # type: ignore[no-untyped-call]


_LIBRARY = torch.library.Library("detr", "FRAGMENT")  # type: ignore[no-untyped-call]
_autocast("cpu")
_autocast("cuda")


def ms_deform_attn(
    value: Tensor,
    shapes: LevelShapes,
    locations: Tensor,
    weights: Tensor,
    points: Sequence[int] | None = None,
) -> Tensor:
    """Multi-scale deformable attention.

    Args:
        value: ``[B, S, M, D]`` float16, bfloat16, float32 or float64.
        shapes: (height, width) of each level, finest first; S is the sum of their products.
        locations: ``[B, Q, M, V, P, 2]`` (x, y) in [0, 1] of each level; computed with in float32
            (float64 where value is). Outside is zero.
        weights: ``[B, Q, M, V, P]``, the same.
        points: Number of points of each level where they are unequal. Locations are then
            ``[B, Q, M, K, 2]`` and weights ``[B, Q, M, K]``, level after level.

    Returns:
        ``[B, Q, M * D]`` in value's type.

    Raises:
        ValueError: Shapes that do not fit each other.
        TypeError: A value type the kernel does not take.
    """
    flat = [int(size) for shape in shapes for size in shape]
    result: Tensor = torch.ops.detr.ms_deform_attn(
        value, flat, _coordinates(value, locations), _coordinates(value, weights), points
    )
    return result
