"""How the boxes of one decoder layer become the references of the next.

A refiner knows what a layer's box head says: offsets from a reference, or distributions of edges.
Heads belong to the decoder, which hands them over.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from detr.config import DetectorConfig, DistributionRefinementConfig
from detr.config.decoder import AnyRefinementConfig
from detr.models.attention.cross import join, split
from detr.models.heads.box_code import BoxCode, OffsetCode, box_code
from detr.models.heads.boxes import box_head
from detr.models.heads.distribution import EDGES, Quality, edge_places, moved_edges


@dataclass
class Course:
    """References of all groups on their way through the layers of one call.

    Attributes:
        references: ``[B, N_g, R]`` per group, from which the next layer starts. They never carry
            gradient from a later layer's sampling.
        attached: The same with the gradient of the layer before, where it is kept.
        first: ``[B, N, 4]`` boxes the first layer said, with gradient; distributions only.
        edges: ``[B, N, 4, R + 1]`` logits of the last layer; distributions only.
        hidden: ``[B, N, D]`` of the last layer, without gradient; distributions only.
    """

    references: list[Tensor]
    attached: list[Tensor] = field(default_factory=list)
    first: Tensor | None = None
    edges: Tensor | None = None
    hidden: Tensor | None = None

    @property
    def sizes(self) -> list[int]:
        """Number of queries of each group."""
        return [reference.shape[1] for reference in self.references]


@dataclass
class Layer:
    """One layer's part in it.

    Attributes:
        index: From 0.
        head: Its box head.
        hidden: ``[B, N, D]`` what the layer made of the queries.
        normed: The same after the decoder's last norm, or itself where there is none.
        last: Whether no layer follows.
        answers: Whether anybody wants its boxes.
    """

    index: int
    head: nn.Module
    hidden: Tensor
    normed: Tensor
    last: bool
    answers: bool


class Refiner(nn.Module, ABC):
    """Makes boxes and moves references."""

    @abstractmethod
    def step(self, course: Course, layer: Layer) -> Tensor | None:
        """Boxes ``[B, N, 4]`` of a layer, if it answers; the course then is the next layer's."""

    def quality(self, course: Course, index: int) -> Tensor | None:
        """What the boxes of the layer just gone add to its class logits, ``[B, N, 1]``."""
        return None


class OffsetRefiner(Refiner):
    """Boxes lie where the layer's references and its head say; references move or stay.

    Args:
        config: The decoder's refinement.
        code: What the head's numbers mean.
    """

    def __init__(self, config: AnyRefinementConfig, code: BoxCode) -> None:
        super().__init__()
        self.moves, self.twice, self.code = config.moves, config.looks_forward_twice, code

    def step(self, course: Course, layer: Layer) -> Tensor | None:
        """See the base class."""
        running = layer.head(layer.hidden) if self.moves and not layer.last else None
        boxes = self._boxes(course, layer, running) if layer.answers else None
        if running is not None:
            updated = self.code.boxes(self._base(course.references), running)
            # Look-forward-twice keeps the un-detached one for the loss boxes (DINO, section 3.5).
            course.attached = split(updated, course.sizes)
            course.references = split(updated.detach(), course.sizes)
        return boxes

    def _boxes(self, course: Course, layer: Layer, running: Tensor | None) -> Tensor:
        if running is not None and layer.normed is layer.hidden:
            # The box head saw this very tensor when it updated the reference.
            delta = running
        else:
            delta = layer.head(layer.normed)
        twice = self.twice and course.attached
        base = self._base(course.attached if twice else course.references)
        return self.code.boxes(base, delta)

    def _base(self, references: list[Tensor]) -> Tensor:
        """``[B, N, 4]`` what the head's numbers are added to."""
        return join([self.code.base(reference) for reference in references])


class DistributionRefiner(Refiner):
    """The first layer says a box; every layer refines where its edges lie (D-FINE section 4.1).

    Args:
        config: The detector.
        refinement: Its decoder's refinement.
    """

    places: Tensor

    def __init__(self, config: DetectorConfig, refinement: DistributionRefinementConfig) -> None:
        super().__init__()
        self.code = OffsetCode(config.heads.boxes.logit_eps)
        self.curvature = refinement.curvature
        self.initial = box_head(config.width)
        self.qualities = nn.ModuleList(
            Quality(refinement.quality) for _ in range(config.decoder.layers)
        )
        # Follows from the config.
        self.register_buffer("places", edge_places(refinement), persistent=False)

    def step(self, course: Course, layer: Layer) -> Tensor | None:
        """See the base class; boxes are at hand anyway."""
        if course.first is None:
            base = join([self.code.base(reference) for reference in course.references])
            course.first = self.code.boxes(base, self.initial(layer.hidden))
        seen = layer.hidden if course.hidden is None else layer.hidden + course.hidden
        edges = layer.head(seen).unflatten(-1, (EDGES, -1))
        if edges.dtype in (torch.float16, torch.bfloat16):
            # Layers add small corrections, and a box has more pixels than halves tell apart.
            edges = edges.float()
        course.edges = edges if course.edges is None else edges + course.edges
        boxes = self.boxes(course.first.detach(), course.edges)
        course.hidden = layer.hidden.detach()
        course.references = split(boxes.detach(), course.sizes)
        return boxes

    def boxes(self, first: Tensor, edges: Tensor) -> Tensor:
        """Boxes ``[..., 4]`` cx cy w h of first ones and edges' logits ``[..., 4, R + 1]``."""
        # No product of matrices, which autocast would compute in halves.
        distances = (edges.softmax(-1) * self.places.to(edges.dtype)).sum(-1)
        return moved_edges(first, distances, self.curvature)

    def quality(self, course: Course, index: int) -> Tensor | None:
        """See the base class."""
        assert course.edges is not None
        out: Tensor = self.qualities[index](course.edges.softmax(-1))
        return out


def build_refiner(config: DetectorConfig) -> Refiner:
    """The refiner of a detector's decoder."""
    refinement = config.decoder.refinement
    if refinement.distribution is not None:
        return DistributionRefiner(config, refinement.distribution)
    return OffsetRefiner(refinement, box_code(config.heads.boxes))


def edge_head(config: DetectorConfig, refinement: DistributionRefinementConfig) -> nn.Module:
    """Logits ``[..., 4 * (R + 1)]`` of a layer's edges, which start as those before."""
    return box_head(config.width, outputs=EDGES * (refinement.bins + 1))
