"""Small problems of deformable attention as torch tensors, with their answers in float64.

The answers come from :mod:`detr.msda.fallback`, which shares no code with the kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from detr import msda
from detr.models.attention import msda_cuda
from detr.models.attention.ms_deform_attn import ms_deform_attn
from detr.msda import fallback
from detr.msda.check import check_sizes

SHAPES = ((7, 9), (3, 4), (1, 1), (5, 2))
DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}
# Largest error relative to the largest value: of what is rounded to the value's type, and of sums
# in the type of the coordinates.
ROUNDED = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3, "float64": 1e-14}
SUMMED = {"float32": 4e-6, "float16": 4e-6, "bfloat16": 4e-6, "float64": 1e-14}
# grid_sample rounds coordinates once more, on their way through [-1, 1].
GRID_SAMPLE = 1e-3


@dataclass
class Problem:
    """Inputs on a device.

    Attributes:
        value: ``[B, S, M, D]``.
        locations: ``[B, Q, M, V, P, 2]``, like the weights float32 unless the value is float64.
        weights: ``[B, Q, M, V, P]``.
        grad_out: ``[B, Q, M * D]``, value's type.
        shapes: (height, width) of each level.
    """

    value: Tensor
    locations: Tensor
    weights: Tensor
    grad_out: Tensor
    shapes: tuple[tuple[int, int], ...] = SHAPES

    @property
    def dtype(self) -> str:
        """Of the value, as the kernels call it."""
        return str(self.value.dtype).removeprefix("torch.")

    @property
    def has_kernel(self) -> bool:
        """Whether a kernel of ours runs it here."""
        if self.value.device.type == "cpu":
            return msda.native_available()
        sizes = check_sizes(self.value, self.shapes, self.locations, self.weights)
        return msda_cuda.has_kernel(self.value, sizes)

    def run(self) -> list[Tensor]:
        """Output, and gradients of value, locations and weights."""
        inputs = (self.value, self.locations, self.weights)
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        out = ms_deform_attn(leaves[0], self.shapes, leaves[1], leaves[2])
        return [out.detach(), *torch.autograd.grad(out, leaves, self.grad_out)]

    def exact(self) -> list[Tensor]:
        """The same in float64, on the CPU."""
        tensors = (self.value, self.locations, self.weights, self.grad_out)
        value, locations, weights, grad_out = (t.detach().cpu().double().numpy() for t in tensors)
        sizes = check_sizes(value, self.shapes, locations, weights)
        out = fallback.forward(sizes, value, locations, weights).reshape(sizes.out)
        gradients = fallback.backward(sizes, grad_out, value, locations, weights)
        return [torch.from_numpy(np.ascontiguousarray(array)) for array in (out, *gradients)]

    def shares(self, found: list[Tensor]) -> dict[str, float]:
        """Each error as a share of what is allowed: 1 is the most."""
        names = ("out", "value", "locations", "weights")
        dtype, kernel = self.dtype, self.has_kernel
        shares = {}
        for name, tensor, exact in zip(names, found, self.exact(), strict=True):
            if tuple(tensor.shape) != tuple(exact.shape):
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}")
            allowed = (ROUNDED if name in ("out", "value") else SUMMED)[dtype]
            if not kernel:
                allowed = max(allowed, GRID_SAMPLE)
            error = (
                (tensor.cpu().double() - exact).abs().max() if exact.numel() else torch.zeros(())
            )
            scale = exact.abs().max() if exact.numel() else torch.ones(())
            shares[name] = float(error / scale.clamp(min=1e-3)) / allowed
        # NaN is no number that could be compared, and would pass.
        return {name: share if share == share else float("inf") for name, share in shares.items()}


def problem(
    dtype: str,
    device: torch.device,
    channels: int = 32,
    batch: int = 2,
    queries: int = 11,
    heads: int = 3,
    points: int = 2,
    shapes: tuple[tuple[int, int], ...] = SHAPES,
    wild: bool = False,
) -> Problem:
    """Random inputs; samples reach beyond the maps, ``wild`` ones are no numbers or infinite."""
    generator = torch.Generator().manual_seed(channels + 1000 * queries)
    coordinates = torch.float64 if dtype == "float64" else torch.float32
    tokens = sum(height * width for height, width in shapes)
    at = (batch, queries, heads, len(shapes), points)
    locations = torch.rand(*at, 2, generator=generator, dtype=coordinates) * 1.6 - 0.3
    if wild:
        locations[0, 0, 0, 0, 0] = torch.tensor([float("nan"), 1e30])
        locations[-1, -1, -1, -1, -1] = torch.tensor([float("-inf"), float("inf")])
        locations[0, 1, 1] = 1.0  # the last corner of every level, at the end of the array
    value = torch.randn(batch, tokens, heads, channels, generator=generator, dtype=coordinates)
    grad_out = torch.randn(batch, queries, heads * channels, generator=generator, dtype=coordinates)
    return Problem(
        value.to(device, DTYPES[dtype]),
        locations.to(device),
        torch.rand(at, generator=generator, dtype=coordinates).to(device),
        grad_out.to(device, DTYPES[dtype]),
        shapes,
    )
