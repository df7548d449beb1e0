"""The CUDA kernels of :mod:`detr.msda` on torch tensors.

Shape legend as in :mod:`detr.models.attention.ms_deform_attn`.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor

from detr.errors import UserError
from detr.msda import cuda_kernels
from detr.msda.check import Sizes, dtype_name
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


def _attention(value: Tensor, sizes: Sizes) -> Attention:
    return _kind(dtype_name(value), sizes.heads, sizes.channels, len(sizes.shapes), sizes.points)


def has_kernel(value: Tensor, sizes: Sizes) -> bool:
    """Whether the CUDA kernel can run this; otherwise ``grid_sample`` has to."""
    if value.device.type != "cuda" or torch.version.cuda is None:
        return False
    return _attention(value, sizes).supported and _bindings_available()


def _dense(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().contiguous()
    return tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor


def _where(value: Tensor) -> tuple[int, int]:
    """Number and current stream of the value's device."""
    stream = torch.cuda.current_stream(value.device)
    return stream.device_index, int(stream.cuda_stream)


def forward(value: Tensor, sizes: Sizes, locations: Tensor, weights: Tensor) -> Tensor:
    """``[B, Q, M * D]``; arguments as ``ms_deform_attn``'s, with their sizes as checked."""
    out = value.new_empty(sizes.out)
    inputs = [_dense(tensor) for tensor in (value, locations, weights)]
    cuda_kernels.forward(
        _attention(value, sizes),
        *_where(value),
        (sizes.batch, sizes.queries),
        [tensor.data_ptr() for tensor in inputs],
        out.data_ptr(),
        sizes.shapes,
    )
    return out


def backward(
    grad_out: Tensor, value: Tensor, sizes: Sizes, locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights; sums of grad_value in no fixed order."""
    inputs = [_dense(tensor) for tensor in (grad_out, value, locations, weights)]
    sums = torch.zeros(value.shape, dtype=weights.dtype, device=value.device)
    grad_locations, grad_weights = (torch.empty_like(tensor) for tensor in inputs[2:])
    cuda_kernels.backward(
        _attention(value, sizes),
        *_where(value),
        (sizes.batch, sizes.queries),
        [tensor.data_ptr() for tensor in inputs],
        [sums.data_ptr(), grad_locations.data_ptr(), grad_weights.data_ptr()],
        sizes.shapes,
    )
    return sums.to(value.dtype), grad_locations, grad_weights
