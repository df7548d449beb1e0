"""Which query stands for which ground-truth box: the pairs an assignment makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Matches:
    """Assigned pairs over all layers and images, M of them, as index tensors ``[M]``.

    Attributes:
        layer, image, query: Where the prediction stands in ``[L, B, N]``.
        box: Index of the ground-truth box within its image.
    """

    layer: Tensor
    image: Tensor
    query: Tensor
    box: Tensor

    def where(self, mask: Tensor) -> Matches:
        """The pairs for which ``mask [M]`` is true."""
        # Found once: their number is asked of the device, and that takes as long as all before it.
        return self.take(mask.nonzero()[:, 0])

    def take(self, index: Tensor) -> Matches:
        """The pairs at the places ``index [K]``."""
        return Matches(self.layer[index], self.image[index], self.query[index], self.box[index])

    def at(self, layer: int, to: int | None = None) -> Matches:
        """The pairs of one layer, as layer ``to`` if that is given."""
        chosen = self.where(self.layer == layer)
        if to is not None:
            chosen.layer = torch.full_like(chosen.layer, to)
        return chosen

    def layers(self, layers: Sequence[int]) -> Matches:
        """The pairs of some layers, as layers 0, 1, ... in that order."""
        return join_matches([self.at(layer, to=i) for i, layer in enumerate(layers)])


def join_matches(parts: Sequence[Matches]) -> Matches:
    """All pairs of several (at least one) sets of matches."""
    return Matches(
        torch.cat([p.layer for p in parts]),
        torch.cat([p.image for p in parts]),
        torch.cat([p.query for p in parts]),
        torch.cat([p.box for p in parts]),
    )
