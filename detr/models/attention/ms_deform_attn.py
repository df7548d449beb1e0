"""The torch operator ``detr::ms_deform_attn``: registered when this module is imported.

One operator, so that an exported graph holds one node per attention. It runs the compiled kernels
of :mod:`detr.msda`, on the CPU and on CUDA; where there is none (no compiler at installation,
another device), the ``grid_sample`` path.

Shape legend: B batch, S tokens of all levels, M heads, D channels of a head, Q queries, V levels,
P points.
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
from detr.msda.check import check_like, check_sizes, dtype_name


def _pairs(spatial_shapes: Sequence[int]) -> LevelShapes:
    """(height, width) pairs of the flat list an operator can take."""
    if len(spatial_shapes) % 2:
        raise ValueError("spatial_shapes must list a height and a width per level")
    return tuple(zip(spatial_shapes[::2], spatial_shapes[1::2], strict=True))


def ms_deform_attn_reference(
    value: Tensor, shapes: LevelShapes, locations: Tensor, weights: Tensor
) -> Tensor:
    """Deformable attention with ``grid_sample``: differentiable, any device, slow.

    Arguments and result as :func:`ms_deform_attn`. Half precision values are widened first, so
    coordinates and sums keep the precision of ``locations``.
    """
    batch, _, heads, channels = value.shape
    sampled = [F.grid_sample(m, g, align_corners=False) for m, g in _maps(value, shapes, locations)]
    samples = torch.cat(sampled, dim=-1)  # [B*M, D, Q, V*P]
    share = weights.transpose(1, 2).flatten(0, 1).flatten(2).unsqueeze(1)  # [B*M, 1, Q, V*P]
    out = (samples * share).sum(-1).reshape(batch, heads * channels, locations.shape[1])
    return out.transpose(1, 2).to(value.dtype)


def _maps(value: Tensor, shapes: LevelShapes, locations: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Each level as ``grid_sample`` wants it: maps ``[B*M, D, H, W]``, grid ``[B*M, Q, P, 2]``."""
    batch, _, heads, channels = value.shape
    counts = [height * width for height, width in shapes]
    levels = torch.split(value.to(locations.dtype), counts, dim=1)
    for level, shape in enumerate(shapes):
        maps = levels[level].permute(0, 2, 3, 1).reshape(batch * heads, channels, *shape)
        yield maps, (2 * locations[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)


def _reference_backward(
    grad_out: Tensor, value: Tensor, shapes: LevelShapes, locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`ms_deform_attn_reference`, level by level.

    Written out because an operator's own implementation runs below autograd.
    """
    batch, _, heads, channels = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    gradient = (
        grad_out.to(weights.dtype).reshape(batch, queries, heads, channels).permute(0, 2, 3, 1)
    )
    gradient = gradient.flatten(0, 1).unsqueeze(-1)  # [B*M, D, Q, 1]
    share = weights.permute(3, 0, 2, 1, 4).flatten(1, 2).unsqueeze(2)  # [V, B*M, 1, Q, P]
    grad_maps, grad_locations, grad_weights = [], [], []
    for level, (maps, grid) in enumerate(_maps(value, shapes, locations)):
        sampled = F.grid_sample(maps, grid, align_corners=False)
        grad_weights.append((sampled * gradient).sum(1))
        grad_map, grad_grid = torch.ops.aten.grid_sampler_2d_backward(
            gradient * share[level], maps, grid, 0, 0, False, [True, True]
        )
        grad_maps.append(grad_map.flatten(2))
        grad_locations.append(2 * grad_grid)
    per_head = (batch, heads, queries, len(shapes), points)
    return (
        torch.cat(grad_maps, 2)
        .view(batch, heads, channels, value.shape[1])
        .permute(0, 3, 1, 2)
        .to(value.dtype),
        torch.stack(grad_locations, 2).view(*per_head, 2).transpose(1, 2),
        torch.stack(grad_weights, 2).view(per_head).transpose(1, 2),
    )


@torch.library.custom_op("detr::ms_deform_attn", mutates_args=())
def _forward(
    value: Tensor, spatial_shapes: Sequence[int], locations: Tensor, weights: Tensor
) -> Tensor:
    shapes = _pairs(spatial_shapes)
    check_sizes(value, shapes, locations, weights)
    if value.device.type == "cpu" and msda.native_available():
        out = value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])
        msda.forward(value, shapes, locations, weights, out, torch.get_num_threads())
        return out
    if msda_cuda.has_kernel(value, shapes, locations):
        return msda_cuda.forward(value, shapes, locations, weights)
    return ms_deform_attn_reference(value, shapes, locations, weights).contiguous()


@_forward.register_fake
def _(value: Tensor, spatial_shapes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    return value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])


@torch.library.custom_op("detr::ms_deform_attn_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    locations: Tensor,
    weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = _pairs(spatial_shapes)
    sizes = check_sizes(value, shapes, locations, weights)
    check_like("grad_out", grad_out, sizes.out, dtype_name(value))
    if value.device.type == "cpu" and msda.native_available():
        like = torch.contiguous_format
        out = (
            torch.empty_like(value, memory_format=like),
            torch.empty_like(locations, memory_format=like),
            torch.empty_like(weights, memory_format=like),
        )
        msda.backward(grad_out, value, shapes, locations, weights, out, torch.get_num_threads())
        return out
    # The CUDA kernel adds up in no fixed order. grid_sample does not either, and tells those who
    # asked for deterministic algorithms.
    if not torch.are_deterministic_algorithms_enabled() and msda_cuda.has_kernel(
        value, shapes, locations
    ):
        return msda_cuda.backward(grad_out, value, shapes, locations, weights)
    grads = _reference_backward(grad_out, value, shapes, locations, weights)
    return grads[0].contiguous(), grads[1].contiguous(), grads[2].contiguous()


@_backward.register_fake
def _(
    grad_out: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    locations: Tensor,
    weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    like = torch.contiguous_format
    return (
        torch.empty_like(value, memory_format=like),
        torch.empty_like(locations, memory_format=like),
        torch.empty_like(weights, memory_format=like),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, spatial_shapes, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)
    ctx.spatial_shapes = spatial_shapes


def _differentiate(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
    value, locations, weights = ctx.saved_tensors
    grad_value, grad_locations, grad_weights = _backward(
        grad_out, value, ctx.spatial_shapes, locations, weights
    )
    return grad_value, None, grad_locations, grad_weights


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def _coordinates(value: Tensor, tensor: Tensor) -> Tensor:
    """Locations or weights in the one precision the kernel takes for this value."""
    return tensor.to(torch.float64 if value.dtype == torch.float64 else torch.float32)


def _autocast(device: str) -> None:
    """Under autocast the value keeps its (half) type, locations and weights become float32.

    torch's own rule for custom operators would cast all three to half.
    """

    def cast(
        value: Tensor, spatial_shapes: Sequence[int], locations: Tensor, weights: Tensor
    ) -> Tensor:
        with torch.autocast(device, enabled=False):
            result: Tensor = torch.ops.detr.ms_deform_attn(
                value, spatial_shapes, _coordinates(value, locations), _coordinates(value, weights)
            )
            return result

    key = f"Autocast{device.upper()}"
    _LIBRARY.impl("ms_deform_attn", cast, key)  # type: ignore[no-untyped-call]


_LIBRARY = torch.library.Library("detr", "FRAGMENT")  # type: ignore[no-untyped-call]
_autocast("cpu")
_autocast("cuda")


def ms_deform_attn(
    value: Tensor, shapes: LevelShapes, locations: Tensor, weights: Tensor
) -> Tensor:
    """Multi-scale deformable attention.

    Args:
        value: ``[B, S, M, D]`` float16, bfloat16, float32 or float64.
        shapes: (height, width) of each level, finest first; S is the sum of their products.
        locations: ``[B, Q, M, V, P, 2]`` (x, y) in [0, 1] of each level; computed with in float32
            (float64 where value is). Outside is zero.
        weights: ``[B, Q, M, V, P]``, the same.

    Returns:
        ``[B, Q, M * D]`` in value's type.

    Raises:
        ValueError: Shapes that do not fit each other.
        TypeError: A value type the kernel does not take.
    """
    flat = [int(size) for shape in shapes for size in shape]
    result: Tensor = torch.ops.detr.ms_deform_attn(
        value, flat, _coordinates(value, locations), _coordinates(value, weights)
    )
    return result
