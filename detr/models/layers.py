"""Small building blocks shared by encoder, decoder and heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from detr.config import DecoderConfig, LayerStack

# Makes the norm of so many channels.
NormOf = Callable[[int], nn.Module]


class TokenLinear(nn.Linear):
    """Linear map of an encoder's tokens, which may be another one on each level.

    Args:
        width: Model width D.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, width)
        self.levels: nn.ModuleList | None = None

    def forward(self, input: Tensor, shapes: Sequence[tuple[int, int]] = ()) -> Tensor:
        """``[B, S, E]`` to ``[B, S, D]``; ``shapes`` (height, width) of the levels."""
        if self.levels is None:
            return super().forward(input)
        parts = torch.split(input, [height * width for height, width in shapes], 1)
        return torch.cat([level(x) for level, x in zip(self.levels, parts, strict=True)], 1)

    @torch.no_grad()
    def follow(self, maps: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Takes in a linear map of each level, weights ``[D, E]`` and ``[D]``, that went before."""
        self.levels = nn.ModuleList()
        for weight, bias in maps:
            level = nn.Linear(weight.shape[1], self.out_features)
            level.weight = nn.Parameter(self.weight @ weight)
            level.bias = nn.Parameter(self.bias + self.weight @ bias)
            self.levels.append(level)


class MLP(nn.Module):
    """Linear layers with an activation between them.

    Args:
        sizes: Widths from input to output.

    Attributes:
        activation: ReLU; a detector's config may say otherwise.
    """

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.activation: Callable[[Tensor], Tensor] = functional.relu

    def forward(self, x: Tensor) -> Tensor:
        """``[..., sizes[0]]`` to ``[..., sizes[-1]]``."""
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        out: Tensor = self.layers[-1](x)
        return out


def inner_mlp(*sizes: int) -> MLP:
    """An :class:`MLP` within a transformer, whose weights all start as Xavier's; heads do not."""
    mlp = MLP(*sizes)
    for layer in mlp.layers:
        assert isinstance(layer, nn.Linear)
        nn.init.xavier_uniform_(layer.weight)
    return mlp


class Gate(nn.Module):
    """Weighs what was known against what was found, channel by channel, and norms the sum (D-FINE).

    Both start with a half.

    Args:
        width: Model width D.
        norm: Of the sum.
    """

    def __init__(self, width: int, norm: NormOf = nn.LayerNorm) -> None:
        super().__init__()
        self.weigh = nn.Linear(2 * width, 2 * width)
        self.norm = norm(width)
        nn.init.zeros_(self.weigh.weight)
        nn.init.zeros_(self.weigh.bias)

    def forward(self, known: Tensor, found: Tensor) -> Tensor:
        """Two ``[..., D]`` to one."""
        shares = self.weigh(torch.cat((known, found), -1)).sigmoid()
        first, second = shares.chunk(2, -1)
        out: Tensor = self.norm(first * known + second * found)
        return out


class InnerReLU(nn.ReLU):
    """ReLU of a linear layer's output, in place unless gradients are kept.

    The output is the model's largest tensor: a second one costs a tenth of inference. With
    gradients it is a view, and autograd pays for changing one with two copies of its gradient.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Any shape."""
        return functional.relu(input, inplace=not torch.is_grad_enabled())


class SwiGLU(nn.Module):
    """SiLU of the first half of the channels times the second (Shazeer 2020, GLU Variants)."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., 2 C]`` to ``[..., C]``."""
        gate, value = x.chunk(2, -1)
        return functional.silu(gate) * value


_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": InnerReLU,
    "prelu": nn.PReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "swiglu": SwiGLU,
}


class RMSNorm(nn.Module):
    """Divides by the root of the mean square and scales (Zhang and Sennrich 2019).

    Written out: exporters know no such operator in the opsets that every engine runs. Squares are
    float32's, since in half precision those of more than 256 are infinite.

    Args:
        width: Channels.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., width]`` to the same."""
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + _RMS_EPS)
        return normed.to(x.dtype) * self.weight


# Of DEIMv2's norms.
_RMS_EPS = 1e-6
_NORMS: dict[str, NormOf] = {"layer": nn.LayerNorm, "rms": RMSNorm}


def norm_of(decoder: DecoderConfig) -> NormOf:
    """What makes a decoder's norms."""
    return _NORMS[decoder.norm]


class FeedForward(nn.Module):
    """Post-norm feed-forward block of a transformer layer.

    Args:
        width: Model width D.
        stack: The layers it belongs to.
        dropout: Of both linear layers' outputs.
        norm: Of the sum.
    """

    def __init__(
        self, width: int, stack: LayerStack, dropout: float, norm: NormOf = nn.LayerNorm
    ) -> None:
        super().__init__()
        halves = 2 if stack.activation == "swiglu" else 1
        self.expand = nn.Linear(width, halves * stack.ffn)
        self.activation = _ACTIVATIONS[stack.activation]()
        self.contract = nn.Linear(stack.ffn, width)
        self.norm = norm(width)
        self.dropout = nn.Dropout(dropout)
        nn.init.xavier_uniform_(self.expand.weight)
        nn.init.xavier_uniform_(self.contract.weight)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D]`` to ``[..., D]``."""
        hidden = self.dropout(self.activation(self.expand(x)))
        out: Tensor = self.norm(x + self.dropout(self.contract(hidden)))
        return out
