"""The decoder's heads, for who else reads by them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Heads:
    """One layer's heads and the norm before them.

    No module: whoever keeps it shares the decoder's weights and has none of its own.

    Attributes:
        norm: Before the heads, or ``None``.
        classes: ``[..., D]`` to class logits ``[..., K]``.
        boxes: ``[..., D]`` to box offsets ``[..., 4]``.
        masks: ``[..., D]`` to what a query says of its mask, ``[..., C]``, or ``None``.
    """

    norm: nn.Module | None
    classes: nn.Module
    boxes: nn.Module
    masks: nn.Module | None

    def of(self, content: Tensor) -> tuple[Tensor, Tensor | None]:
        """Class logits and masks of queries ``[..., D]``, after the norm."""
        normed = content if self.norm is None else self.norm(content)
        return self.classes(normed), None if self.masks is None else self.masks(normed)
