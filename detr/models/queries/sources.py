"""Where a detector's own queries come from, and how any query's reference becomes its position.

A source makes the ``own`` group and, for groups that bring no position of their own, derives one
from the reference (:meth:`QuerySource.position`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional

from detr.config import AnchorQueriesConfig, DetectorConfig, LearnedQueriesConfig
from detr.models.boxes import inverse_sigmoid
from detr.models.heads.shared import Heads
from detr.models.layers import MLP, inner_mlp
from detr.models.queries.position import YXWH, reference_embedding
from detr.models.structures import Memory, QueryGroup


class QuerySource(nn.Module, ABC):
    """Makes a detector's own queries.

    Attributes:
        position_follows_reference: Whether positions are made anew from each layer's reference.
    """

    position_follows_reference = False

    @abstractmethod
    def forward(self, memory: Memory, indices: Tensor | None = None) -> QueryGroup:
        """The ``own`` group of a batch.

        Args:
            memory: The batch.
            indices: ``[B, N]`` tokens that propose in place of the best ones; learned queries and
                anchors have no use for it.
        """

    def judge_by(self, heads: Heads) -> None:
        """Tells a source of the decoder's heads; most have no use for them."""

    def training_groups(self, memory: Memory) -> list[QueryGroup]:
        """The ``own`` group and those that only training has."""
        return [self(memory)]

    @abstractmethod
    def position(self, reference: Tensor, memory: Memory) -> Tensor:
        """Position ``[B, N, D]`` of a reference ``[B, N, R]``, for groups that bring none."""


class LearnedQueries(QuerySource):
    """A learned position, from which the reference follows.

    Deformable DETR learns the content, too, and its reference is a linear map of the position;
    Conditional DETR's is an MLP of it. DETR's boxes refer to nothing, which is the same as all of
    them referring to the middle of the image.

    Groups without a position get the sine code that encoder tokens at their center have, which
    needs no inverse of the learned map and treats 2-d and 4-d references alike.
    """

    def __init__(self, config: DetectorConfig, queries: LearnedQueriesConfig) -> None:
        super().__init__()
        self.config, self.learned_content = config, queries.learned_content
        width = config.width
        self.embedding = nn.Embedding(queries.number, (1 + queries.learned_content) * width)
        self.reference_points: nn.Linear | MLP | None = None
        if queries.reference == "linear":
            self.reference_points = nn.Linear(width, 2)
            nn.init.xavier_uniform_(self.reference_points.weight)
            nn.init.zeros_(self.reference_points.bias)
        elif queries.reference == "mlp":
            self.reference_points = inner_mlp(width, width, 2)

    def forward(self, memory: Memory, indices: Tensor | None = None) -> QueryGroup:
        """See the base class."""
        batch = memory.tokens.shape[0]
        if self.learned_content:
            position, content = self.embedding.weight.chunk(2, -1)
        else:
            position = self.embedding.weight
            content = torch.zeros_like(position)
        reference = self.reference(position)
        return QueryGroup(
            role="own",
            content=content[None].expand(batch, -1, -1),
            reference=reference[None].expand(batch, -1, -1),
            position=position[None].expand(batch, -1, -1),
        )

    def reference(self, position: Tensor) -> Tensor:
        """Reference ``[..., 2]`` of a learned position ``[..., D]``."""
        if self.reference_points is None:
            return torch.full_like(position[..., :2], 0.5)
        out: Tensor = self.reference_points(position)
        if out.dtype in (torch.float16, torch.bfloat16):
            # Autocast's halves tell neighboring pixels of a large image apart no more, and every
            # layer's boxes start from these.
            out = out.float()
        out = out.sigmoid()
        return out

    def position(self, reference: Tensor, memory: Memory) -> Tensor:
        """See the base class."""
        config = self.config
        return reference_embedding(
            reference[..., :2], YXWH[:2], config.width // 2, config.positions.temperature
        )


class AnchorQueries(QuerySource):
    """DAB-DETR: learned boxes, whose position is an MLP of their sine code.

    The content is zero, or one of a few learned patterns, each of which is paired with every
    anchor, or learned per anchor. Where the decoder samples the padded canvas
    (DAB-Deformable-DETR), positions are those on its level 0. With denoising, the last channel
    tells these queries (0) from denoising ones (1); where content would be zero, the rest says
    "unknown label", see :class:`detr.models.queries.denoising.PlainDenoiser`.
    """

    position_follows_reference = True

    def __init__(self, config: DetectorConfig, queries: AnchorQueriesConfig) -> None:
        super().__init__()
        self.width, self.number, self.patterns = config.width, queries.number, queries.patterns
        self.on_canvas = config.decoder.cross_attention.samples
        # The content's last channel is denoising's indicator.
        self.told = int(queries.denoising is not None)
        # Kept as logits, so that no step leaves [0, 1].
        self.anchors = nn.Embedding(queries.number, 4)
        if queries.random_centers:
            with torch.no_grad():
                centers = self.anchors.weight[:, :2]
                centers.copy_(inverse_sigmoid(torch.rand_like(centers)))
        count = queries.number if queries.learned_content else queries.patterns
        self.content = nn.Embedding(count, config.width - self.told) if count else None
        self.reference_mlp = inner_mlp(2 * config.width, config.width, config.width)

    def forward(self, memory: Memory, indices: Tensor | None = None) -> QueryGroup:
        """See the base class."""
        batch = memory.tokens.shape[0]
        anchors = self.anchors.weight.sigmoid()
        if self.content is None:
            content = anchors.new_zeros(self.number, self.width)
        elif self.patterns:
            content = self.content.weight.repeat_interleave(self.number, 0)
            anchors = anchors.repeat(self.patterns, 1)
        else:
            content = functional.pad(self.content.weight, (0, self.told))
        return QueryGroup(
            role="own",
            content=content[None].expand(batch, -1, -1),
            reference=anchors[None].expand(batch, -1, -1),
        )

    def position(self, reference: Tensor, memory: Memory) -> Tensor:
        """See the base class."""
        if self.on_canvas:
            reference = reference * memory.valid_ratios[:, :1].repeat(1, 1, 2)
        embedding = reference_embedding(reference, YXWH, self.width // 2)
        out: Tensor = self.reference_mlp(embedding)
        return out
