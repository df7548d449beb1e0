"""What every kind of cross-attention is, and where its queries look."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from detr.models.geometry import SamplingFrame
from detr.models.structures import Attention, Memory

# Where the queries of a layer look: sampled locations, a spatial query, or everywhere.
Place = SamplingFrame | Tensor | None


class CrossAttention(nn.Module, ABC):
    """Cross-attention of one decoder layer."""

    @abstractmethod
    def look(
        self, hidden: Tensor, position: Tensor, place: Place, memory: Memory, maps: bool
    ) -> tuple[Tensor, Attention | None]:
        """``[B, N, D]`` content and position to ``[B, N, D]``.

        Args:
            hidden: ``[B, N, D]`` content.
            position: ``[B, N, D]``.
            place: What :meth:`Places.of` says of this layer.
            memory: The batch.
            maps: Also return the attention, where it is not at hand anyway.
        """


class Places(nn.Module, ABC):
    """Says where queries look; one for all layers of a decoder."""

    @abstractmethod
    def of(self, index: int, hidden: Tensor, references: list[Tensor], memory: Memory) -> Place:
        """Where the queries of one layer look.

        Args:
            index: Of the layer, from 0.
            hidden: ``[B, N, D]`` content of all groups.
            references: ``[B, N_g, R]`` per group.
            memory: The batch.
        """


class Everywhere(Places):
    """Queries look at every token alike."""

    def of(self, index: int, hidden: Tensor, references: list[Tensor], memory: Memory) -> Place:
        """See the base class."""
        return None


def join(parts: list[Tensor]) -> Tensor:
    """Concatenation along the queries that leaves a single part alone."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def split(x: Tensor, sizes: list[int]) -> list[Tensor]:
    """The inverse of :func:`join`."""
    return [x] if len(sizes) == 1 else list(torch.split(x, sizes, 1))
