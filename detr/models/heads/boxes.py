"""Box heads."""

from __future__ import annotations

from torch import nn

from detr.models.layers import MLP


def box_head(width: int, placed: bool = True, size_bias: float = 0.0, outputs: int = 4) -> MLP:
    """Three-layer box MLP.

    Args:
        width: Input and hidden width.
        placed: Boxes have references and start where they are; otherwise they start at random.
        size_bias: First value of placed boxes' width and height logits; -2 makes boxes of 0.12
            where the reference is a bare center.
        outputs: 4, or as many as distributions of four edges have.
    """
    head = MLP(width, width, width, outputs)
    if not placed:
        return head
    last = head.layers[-1]
    assert isinstance(last, nn.Linear)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    nn.init.constant_(last.bias.data[2:4], size_bias)
    return head
