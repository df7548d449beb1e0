"""The union of all layers' matches, by which every layer's boxes learn (D-FINE's GO-LSD).

Peng et al. 2024, D-FINE, section 4.2. A query that a few layers gave different boxes keeps the one
that most of them gave it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from distill.distributed import mean_over_processes
from distill.losses.matches import Matches, join_matches


@dataclass
class BoxPairs:
    """Pairs whose boxes learn.

    Attributes:
        matches: Of so many layers.
        normalizer: Scalar that sums over them are divided by.
    """

    matches: Matches
    normalizer: Tensor


@dataclass
class OwnMatches:
    """All assignments of a detector's own queries.

    Attributes:
        layers: Of every decoder layer.
        first: Of what the first layer says before any distribution, as layer 0.
        proposals: Of the encoder's proposals, as layer 0; query i is made of proposal i.
        joined: Whether boxes learn by the union of all of these.
    """

    layers: Matches
    first: Matches | None
    proposals: Matches | None
    joined: bool

    @cached_property
    def union(self) -> Matches:
        """Their union, as layer 0."""
        return union(
            [part for part in (self.layers, self.first, self.proposals) if part is not None]
        )

    @cached_property
    def _count(self) -> Tensor:
        """Pairs in the union, at least one, as its mean over processes."""
        count = torch.tensor(float(len(self.union.query)), device=self.union.query.device)
        return mean_over_processes(count).clamp(min=1)

    def boxed(self, layers: int) -> BoxPairs | None:
        """The union for each of so many layers; ``None`` where each has its own matches."""
        if not self.joined:
            return None
        return BoxPairs(repeated(self.union, layers), self._count)


def union(parts: Sequence[Matches]) -> Matches:
    """Every query that anybody matched, once, with the box it was given most often.

    Args:
        parts: At least one; their layers count alike.

    Returns:
        Pairs of layer 0, ordered by image and query. Of boxes given equally often the first one.
    """
    every = join_matches(parts)
    pairs = torch.stack((every.image, every.query, every.box), 1)
    pairs, counts = torch.unique(pairs, dim=0, return_counts=True)
    # Ordered by image, query and box already; the most frequent comes to the front of its query.
    most = counts.max() + 1 if len(counts) else 1
    place = torch.unique(pairs[:, :2], dim=0, return_inverse=True)[1]
    order = torch.argsort(place * most - counts, stable=True)
    pairs, place = pairs[order], place[order]
    leads = torch.ones_like(place, dtype=torch.bool)
    leads[1:] = place[1:] != place[:-1]
    image, query, box = pairs[leads].unbind(1)
    return Matches(torch.zeros_like(image), image, query, box)


def repeated(matches: Matches, layers: int) -> Matches:
    """The pairs of one layer for each of so many."""
    count = len(matches.query)
    layer = torch.arange(layers, device=matches.query.device).repeat_interleave(count)
    return Matches(
        layer,
        matches.image.repeat(layers),
        matches.query.repeat(layers),
        matches.box.repeat(layers),
    )
