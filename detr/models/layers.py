"""Small building blocks shared by encoder, decoder and heads."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from detr.config import DetectorConfig


class MLP(nn.Module):
    """Linear layers with ReLU between them.

    Args:
        sizes: Widths from input to output.
    """

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., sizes[0]]`` to ``[..., sizes[-1]]``."""
        for layer in self.layers[:-1]:
            x = functional.relu(layer(x))
        out: Tensor = self.layers[-1](x)
        return out


def inner_mlp(*sizes: int) -> MLP:
    """An :class:`MLP` within a transformer, whose weights all start as Xavier's; heads do not."""
    mlp = MLP(*sizes)
    for layer in mlp.layers:
        assert isinstance(layer, nn.Linear)
        nn.init.xavier_uniform_(layer.weight)
    return mlp


class InnerReLU(nn.ReLU):
    """ReLU of a linear layer's output, in place unless gradients are kept.

    The output is the model's largest tensor: a second one costs a tenth of inference. With
    gradients it is a view, and autograd pays for changing one with two copies of its gradient.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Any shape."""
        return functional.relu(input, inplace=not torch.is_grad_enabled())


class FeedForward(nn.Module):
    """Post-norm feed-forward block of a transformer layer."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        width, hidden, dropout = config.width, config.ffn, config.dropout
        self.expand = nn.Linear(width, hidden)
        self.activation = nn.PReLU() if config.activation == "prelu" else InnerReLU()
        self.contract = nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        nn.init.xavier_uniform_(self.expand.weight)
        nn.init.xavier_uniform_(self.contract.weight)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D]`` to ``[..., D]``."""
        hidden = self.dropout(self.activation(self.expand(x)))
        out: Tensor = self.norm(x + self.dropout(self.contract(hidden)))
        return out


def class_head(config: DetectorConfig) -> nn.Linear:
    """Class logits.

    Sigmoid scores start at 0.01 everywhere (focal loss paper, section 4.1); a softmax has one more
    logit, for "no object", and no such start.
    """
    if config.classification == "softmax":
        return nn.Linear(config.width, config.num_classes + 1)
    head = nn.Linear(config.width, config.num_classes)
    nn.init.constant_(head.bias, -math.log(99))
    return head


def box_head(width: int, placed: bool = True, size_bias: float = 0.0) -> MLP:
    """Three-layer box MLP.

    Args:
        width: Input and hidden width.
        placed: Boxes have references and start where they are; otherwise they start at random.
        size_bias: First value of placed boxes' width and height logits; -2 makes boxes of 0.12
            where the reference is a bare centre.
    """
    head = MLP(width, width, width, 4)
    if not placed:
        return head
    last = head.layers[-1]
    assert isinstance(last, nn.Linear)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    nn.init.constant_(last.bias.data[2:], size_bias)
    return head
