"""The CUDA kernels of :mod:`detr.msda` on torch tensors.

Shape legend as in :mod:`detr.models.attention.ms_deform_attn`.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor

from detr.errors import UserError
from detr.models.structures import LevelShapes
from detr.msda import cuda_kernels
from detr.msda.check import dtype_name
from detr.msda.cuda_source import Attention

_ALIGNMENT = 16  # bytes, of the widest load


@cache
def _bindings_available() -> bool:
    """Whether the kernels can be compiled; warns, once, if not."""
    try:
        cuda_kernels.require()
    except UserError as reason:
        warnings.warn(
            f"{reason.message}; deformable attention on CUDA falls back to grid_sample, several "
            "times slower and with all samples in memory",
            RuntimeWarning,
            stacklevel=4,
        )
        return False
    return True


# Every call asks for the same few. A launch takes microseconds, so Python's part of it counts.
_kind = cache(Attention)


def _attention(value: Tensor, shapes: LevelShapes, points: int) -> Attention:
    return _kind(dtype_name(value), value.shape[2], value.shape[3], len(shapes), points)


def has_kernel(value: Tensor, shapes: LevelShapes, locations: Tensor) -> bool:
    """Whether the CUDA kernel can run this; otherwise ``grid_sample`` has to."""
    if value.device.type != "cuda" or torch.version.cuda is None:
        return False
    return _attention(value, shapes, locations.shape[4]).supported and _bindings_available()


def _dense(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().contiguous()
    return tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor


def _where(value: Tensor) -> tuple[int, int]:
    """Number and current stream of the value's device."""
    stream = torch.cuda.current_stream(value.device)
    return stream.device_index, int(stream.cuda_stream)


def forward(value: Tensor, shapes: LevelShapes, locations: Tensor, weights: Tensor) -> Tensor:
    """``[B, Q, M * D]``; arguments as ``ms_deform_attn``'s, already checked."""
    batch, queries = locations.shape[:2]
    out = value.new_empty(batch, queries, value.shape[2] * value.shape[3])
    inputs = [_dense(tensor) for tensor in (value, locations, weights)]
    cuda_kernels.forward(
        _attention(value, shapes, locations.shape[4]),
        *_where(value),
        (batch, queries),
        [tensor.data_ptr() for tensor in inputs],
        out.data_ptr(),
        shapes,
    )
    return out


def backward(
    grad_out: Tensor, value: Tensor, shapes: LevelShapes, locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights; sums of grad_value in no fixed order."""
    batch, queries = locations.shape[:2]
    inputs = [_dense(tensor) for tensor in (grad_out, value, locations, weights)]
    sums = torch.zeros(value.shape, dtype=weights.dtype, device=value.device)
    grad_locations, grad_weights = (torch.empty_like(tensor) for tensor in inputs[2:])
    cuda_kernels.backward(
        _attention(value, shapes, locations.shape[4]),
        *_where(value),
        (batch, queries),
        [tensor.data_ptr() for tensor in inputs],
        [sums.data_ptr(), grad_locations.data_ptr(), grad_weights.data_ptr()],
        shapes,
    )
    return sums.to(value.dtype), grad_locations, grad_weights
