"""Where a detector's own queries come from, and how any query's reference becomes its position.

A source makes the ``own`` group and, for groups that bring no position of their own, derives one
from the reference (:meth:`QuerySource.position`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional

from detr.config import DetectorConfig
from detr.errors import UserError
from detr.models.boxes import inverse_sigmoid
from detr.models.geometry import token_centres
from detr.models.layers import MLP, box_head, class_head, inner_mlp
from detr.models.queries.position import XYWH, YXWH, reference_embedding
from detr.models.structures import LevelShapes, Memory, Proposals, QueryGroup

# Logit of the boxes of tokens that may not propose: sigmoid is exactly 1, and half precision
# holds it, unlike infinity times zero.
NO_PROPOSAL = 1e4


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

    Groups without a position get the sine code that encoder tokens at their centre have, which
    needs no inverse of the learned map and treats 2-d and 4-d references alike.
    """

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.config = config
        width, deformable = config.width, config.attention == "deformable"
        self.embedding = nn.Embedding(config.queries, 2 * width if deformable else width)
        self.reference_points: nn.Linear | MLP | None = None
        if deformable:
            self.reference_points = nn.Linear(width, 2)
            nn.init.xavier_uniform_(self.reference_points.weight)
            nn.init.zeros_(self.reference_points.bias)
        elif config.attention == "conditional":
            self.reference_points = inner_mlp(width, width, 2)

    def forward(self, memory: Memory, indices: Tensor | None = None) -> QueryGroup:
        """See the base class."""
        batch = memory.tokens.shape[0]
        if self.config.attention == "deformable":
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
            # Autocast's halves tell neighbouring pixels of a large image apart no more, and every
            # layer's boxes start from these.
            out = out.float()
        out = out.sigmoid()
        return out

    def position(self, reference: Tensor, memory: Memory) -> Tensor:
        """See the base class."""
        config = self.config
        return reference_embedding(
            reference[..., :2], YXWH[:2], config.width // 2, config.pe_temperature
        )


class AnchorQueries(QuerySource):
    """DAB-DETR: learned boxes, whose position is an MLP of their sine code.

    The content is zero or one of a few learned patterns, each of which is paired with every anchor.
    With deformable attention it is learned per anchor (DAB-Deformable-DETR), and positions are
    those on the padded canvas of level 0. With denoising, the last channel tells these queries (0)
    from denoising ones (1); where content would be zero, the rest says "unknown label", see
    :class:`detr.models.queries.denoising.Denoiser`.
    """

    position_follows_reference = True

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.config = config
        # Kept as logits, so that no step leaves [0, 1].
        self.anchors = nn.Embedding(config.queries, 4)
        if config.random_anchors:
            with torch.no_grad():
                centres = self.anchors.weight[:, :2]
                centres.copy_(inverse_sigmoid(torch.rand_like(centres)))
        deformable, told = config.attention == "deformable", config.denoising is not None
        count = config.queries if deformable else config.patterns
        self.content = nn.Embedding(count, config.width - told) if count else None
        self.reference_mlp = inner_mlp(2 * config.width, config.width, config.width)

    def forward(self, memory: Memory, indices: Tensor | None = None) -> QueryGroup:
        """See the base class."""
        batch, config = memory.tokens.shape[0], self.config
        anchors = self.anchors.weight.sigmoid()
        if self.content is None:
            content = anchors.new_zeros(config.queries, config.width)
        elif config.patterns:
            content = self.content.weight.repeat_interleave(config.queries, 0)
            anchors = anchors.repeat(config.patterns, 1)
        else:
            content = functional.pad(self.content.weight, (0, int(config.denoising is not None)))
        return QueryGroup(
            role="own",
            content=content[None].expand(batch, -1, -1),
            reference=anchors[None].expand(batch, -1, -1),
        )

    def position(self, reference: Tensor, memory: Memory) -> Tensor:
        """See the base class."""
        if self.config.attention == "deformable":
            reference = reference * memory.valid_ratios[:, :1].repeat(1, 1, 2)
        embedding = reference_embedding(reference, YXWH, self.config.width // 2)
        out: Tensor = self.reference_mlp(embedding)
        return out


class ProposalHead(nn.Module):
    """Scores every encoder token and turns the best into boxes (Deformable DETR, appendix A.4).

    Args:
        config: The detector.
        class_agnostic: Rank by the first class channel, which the loss then trains as "any
            object" (Deformable DETR two-stage); otherwise by the best class (DINO).
    """

    def __init__(self, config: DetectorConfig, class_agnostic: bool) -> None:
        super().__init__()
        self.class_agnostic, self.everywhere = class_agnostic, config.proposal_tokens == "all"
        self.project = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width)
        self.class_head = class_head(config)
        self.box_head = box_head(config.width)
        nn.init.xavier_uniform_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, memory: Memory, count: int, indices: Tensor | None = None) -> Proposals:
        """Chooses the best ``count`` tokens, best first, or takes those it is given.

        Tokens in the padding, or whose default box leaves (0.01, 0.99), have zero content and no
        box. They take part when there are not enough others, or where the config lets all propose.

        Raises:
            UserError: ``too-few-tokens`` where the canvas has fewer tokens than queries.
        """
        size = memory.tokens.shape[1]
        if size < count:
            raise UserError(
                "too-few-tokens",
                f"the canvas has {size} encoder tokens, fewer than queries: {count}; "
                "use a larger image size or fewer queries",
            )
        defaults, allowed = default_boxes(memory.valid_ratios, memory.shapes)
        allowed = allowed & ~memory.padding[..., None]
        tokens = self.norm(self.project(memory.tokens.masked_fill(~allowed, 0.0)))
        logits = self.class_head(tokens)
        scores = logits[..., 0] if self.class_agnostic else logits.amax(-1)
        scores = scores.detach()
        if not self.everywhere:
            scores = scores.masked_fill(~allowed[..., 0], -NO_PROPOSAL)
        if indices is None:
            indices = scores.topk(count, dim=1).indices

        def chosen(x: Tensor) -> Tensor:
            return x.gather(1, indices[..., None].expand(-1, -1, x.shape[-1]))

        base = inverse_sigmoid(defaults).masked_fill(~allowed, NO_PROPOSAL)
        # Only the chosen tokens go through the box head: the others' boxes are never read.
        boxes = (self.box_head(chosen(tokens)) + chosen(base)).sigmoid()
        return Proposals(chosen(logits), boxes, indices, self.class_agnostic)


def default_boxes(ratios: Tensor, shapes: LevelShapes) -> tuple[Tensor, Tensor]:
    """The box every token starts from: its cell's centre, side ``0.05 * 2 ** level``.

    Returns:
        Boxes ``[B, S, 4]`` and whether they lie within (0.01, 0.99), ``[B, S, 1]``.
    """
    centres = token_centres(ratios, shapes)
    sides = [
        centres.new_full((1, height * width, 2), 0.05 * 2.0**level)
        for level, (height, width) in enumerate(shapes)
    ]
    boxes = torch.cat((centres, torch.cat(sides, 1).expand_as(centres)), -1)
    return boxes, ((boxes > 0.01) & (boxes < 0.99)).all(-1, keepdim=True)


class TwoStageQueries(QuerySource):
    """Deformable DETR two-stage: position and content both come from the chosen proposals.

    H-DETR learns the content instead, and in training has further proposals share the ground truth
    in a group of their own. Its position is still half of a norm over both, as if the content came
    from the proposals, too.
    """

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.config = config
        self.proposals = ProposalHead(config, class_agnostic=True)
        self.project = nn.Linear(2 * config.width, 2 * config.width)
        self.norm = nn.LayerNorm(2 * config.width)
        nn.init.xavier_uniform_(self.project.weight)
        self.content: nn.Embedding | None = None
        if config.learned_content:
            extra = 0 if config.one_to_many is None else config.one_to_many.queries
            self.content = nn.Embedding(config.queries + extra, config.width)

    def forward(self, memory: Memory, indices: Tensor | None = None) -> QueryGroup:
        """See the base class."""
        return self._group("own", self.proposals(memory, self.config.queries, indices), 0)

    def training_groups(self, memory: Memory) -> list[QueryGroup]:
        """See the base class; adds ``one_to_many``."""
        config = self.config
        if config.one_to_many is None:
            return [self(memory)]
        first = config.queries
        chosen = self.proposals(memory, first + config.one_to_many.queries)
        more = self._group("one_to_many", _part(chosen, slice(first, None)), first)
        more.repeat = config.one_to_many.repeat
        return [self._group("own", _part(chosen, slice(0, first)), 0), more]

    def _group(self, role: str, proposals: Proposals, first: int) -> QueryGroup:
        """Queries of some proposals; ``first`` is the number of the first one's content."""
        anchors = proposals.boxes.detach()
        position, content = self._embed(anchors).chunk(2, -1)
        if self.content is not None:
            count = anchors.shape[1]
            learned = self.content.weight[first : first + count]
            content = learned[None].expand(anchors.shape[0], -1, -1)
        return QueryGroup(role, content, anchors, position, proposals=proposals)

    def position(self, reference: Tensor, memory: Memory) -> Tensor:
        """See the base class; the positional half of what a proposal there would get."""
        return self._embed(reference).chunk(2, -1)[0]

    def _embed(self, boxes: Tensor) -> Tensor:
        out: Tensor = self.norm(
            self.project(reference_embedding(boxes, XYWH, self.config.width // 2))
        )
        return out


def _part(proposals: Proposals, which: slice) -> Proposals:
    """Some of the proposals."""
    return Proposals(
        proposals.logits[:, which],
        proposals.boxes[:, which],
        proposals.indices[:, which],
        proposals.class_agnostic,
    )


class MixedQueries(QuerySource):
    """DINO's mixed query selection: anchors from the encoder, content learned (section 3.4)."""

    position_follows_reference = True

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.config = config
        self.proposals = ProposalHead(config, class_agnostic=False)
        self.content = nn.Embedding(config.queries, config.width)
        self.reference_mlp = inner_mlp(2 * config.width, config.width, config.width)
        nn.init.xavier_uniform_(self.content.weight)

    def forward(self, memory: Memory, indices: Tensor | None = None) -> QueryGroup:
        """See the base class."""
        proposals = self.proposals(memory, self.config.queries, indices)
        content = self.content.weight[None].expand(memory.tokens.shape[0], -1, -1)
        return QueryGroup("own", content, proposals.boxes.detach(), proposals=proposals)

    def position(self, reference: Tensor, memory: Memory) -> Tensor:
        """See the base class; the reference as it lies on the padded canvas of level 0."""
        scale = memory.valid_ratios[:, :1].repeat(1, 1, 2)
        embedding = reference_embedding(reference * scale, YXWH, self.config.width // 2)
        out: Tensor = self.reference_mlp(embedding)
        return out


def query_source(config: DetectorConfig) -> QuerySource:
    """The source a config asks for."""
    if config.query == "learned":
        return LearnedQueries(config)
    if config.query == "anchors":
        return AnchorQueries(config)
    if config.query == "two_stage":
        return TwoStageQueries(config)
    return MixedQueries(config)
