"""Queries from the encoder's proposals."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from detr.config import (
    DetectorConfig,
    MixedQueriesConfig,
    SelectedQueriesConfig,
    TwoStageQueriesConfig,
)
from detr.config.queries import ProposedQueriesConfig
from detr.errors import UserError
from detr.models.boxes import inverse_sigmoid
from detr.models.geometry import token_centers
from detr.models.heads.boxes import box_head
from detr.models.heads.classes import class_head
from detr.models.layers import inner_mlp
from detr.models.queries.position import XYWH, YXWH, reference_embedding
from detr.models.queries.sources import QuerySource
from detr.models.structures import LevelShapes, Memory, Proposals, QueryGroup

# Logit of the boxes of tokens that may not propose: sigmoid is exactly 1, and half precision
# holds it, unlike infinity times zero.
NO_PROPOSAL = 1e4


class ProposalHead(nn.Module):
    """Scores every encoder token and turns the best into boxes (Deformable DETR, appendix A.4).

    Args:
        config: The detector.
        queries: Its queries.
        class_agnostic: Rank by the first class channel, which the loss then trains as "any
            object" (Deformable DETR two-stage); otherwise by the best class (DINO).
    """

    def __init__(
        self, config: DetectorConfig, queries: ProposedQueriesConfig, class_agnostic: bool
    ) -> None:
        super().__init__()
        self.class_agnostic, self.everywhere = class_agnostic, queries.proposal_tokens == "all"
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
        best = chosen(tokens)
        boxes = (self.box_head(best) + chosen(base)).sigmoid()
        return Proposals(chosen(logits), boxes, indices, best, self.class_agnostic)


def default_boxes(ratios: Tensor, shapes: LevelShapes) -> tuple[Tensor, Tensor]:
    """The box every token starts from: its cell's center, side ``0.05 * 2 ** level``.

    Returns:
        Boxes ``[B, S, 4]`` and whether they lie within (0.01, 0.99), ``[B, S, 1]``.
    """
    centers = token_centers(ratios, shapes)
    sides = [
        centers.new_full((1, height * width, 2), 0.05 * 2.0**level)
        for level, (height, width) in enumerate(shapes)
    ]
    boxes = torch.cat((centers, torch.cat(sides, 1).expand_as(centers)), -1)
    return boxes, ((boxes > 0.01) & (boxes < 0.99)).all(-1, keepdim=True)


class TwoStageQueries(QuerySource):
    """Deformable DETR two-stage: position and content both come from the chosen proposals.

    H-DETR learns the content instead, and in training has further proposals share the ground truth
    in a group of their own. Its position is still half of a norm over both, as if the content came
    from the proposals, too.
    """

    def __init__(self, config: DetectorConfig, queries: TwoStageQueriesConfig) -> None:
        super().__init__()
        self.width, self.number = config.width, queries.number
        self.one_to_many = queries.one_to_many
        self.proposals = ProposalHead(config, queries, class_agnostic=True)
        self.project = nn.Linear(2 * config.width, 2 * config.width)
        self.norm = nn.LayerNorm(2 * config.width)
        nn.init.xavier_uniform_(self.project.weight)
        self.content: nn.Embedding | None = None
        if queries.learned_content:
            extra = 0 if queries.one_to_many is None else queries.one_to_many.queries
            self.content = nn.Embedding(queries.number + extra, config.width)

    def forward(self, memory: Memory, indices: Tensor | None = None) -> QueryGroup:
        """See the base class."""
        return self._group("own", self.proposals(memory, self.number, indices), 0)

    def training_groups(self, memory: Memory) -> list[QueryGroup]:
        """See the base class; adds ``one_to_many``."""
        further, first = self.one_to_many, self.number
        if further is None:
            return [self(memory)]
        chosen = self.proposals(memory, first + further.queries)
        more = self._group("one_to_many", _part(chosen, slice(first, None)), first)
        more.repeat = further.repeat
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
        out: Tensor = self.norm(self.project(reference_embedding(boxes, XYWH, self.width // 2)))
        return out


def _part(proposals: Proposals, which: slice) -> Proposals:
    """Some of the proposals."""
    return Proposals(
        proposals.logits[:, which],
        proposals.boxes[:, which],
        proposals.indices[:, which],
        proposals.tokens[:, which],
        proposals.class_agnostic,
    )


class MixedQueries(QuerySource):
    """DINO's mixed query selection: anchors from the encoder, content learned (section 3.4)."""

    position_follows_reference = True

    def __init__(self, config: DetectorConfig, queries: MixedQueriesConfig) -> None:
        super().__init__()
        self.width, self.number = config.width, queries.number
        self.proposals = ProposalHead(config, queries, class_agnostic=False)
        self.content = nn.Embedding(queries.number, config.width)
        self.reference_mlp = inner_mlp(2 * config.width, config.width, config.width)
        nn.init.xavier_uniform_(self.content.weight)

    def forward(self, memory: Memory, indices: Tensor | None = None) -> QueryGroup:
        """See the base class."""
        proposals = self.proposals(memory, self.number, indices)
        content = self.content.weight[None].expand(memory.tokens.shape[0], -1, -1)
        return QueryGroup("own", content, proposals.boxes.detach(), proposals=proposals)

    def position(self, reference: Tensor, memory: Memory) -> Tensor:
        """See the base class; the reference as it lies on the padded canvas of level 0."""
        scale = memory.valid_ratios[:, :1].repeat(1, 1, 2)
        embedding = reference_embedding(reference * scale, YXWH, self.width // 2)
        out: Tensor = self.reference_mlp(embedding)
        return out


class SelectedQueries(QuerySource):
    """RT-DETR's query selection: content and anchors from the chosen tokens, both without gradient.

    Positions are an MLP of the boxes themselves, without a sine code.
    """

    position_follows_reference = True

    def __init__(self, config: DetectorConfig, queries: SelectedQueriesConfig) -> None:
        super().__init__()
        self.number, self.limit = queries.number, queries.position_limit
        self.proposals = ProposalHead(config, queries, class_agnostic=False)
        self.position_mlp = inner_mlp(4, 2 * config.width, config.width)

    def forward(self, memory: Memory, indices: Tensor | None = None) -> QueryGroup:
        """See the base class."""
        proposals = self.proposals(memory, self.number, indices)
        content, anchors = proposals.tokens.detach(), proposals.boxes.detach()
        return QueryGroup("own", content, anchors, proposals=proposals)

    def position(self, reference: Tensor, memory: Memory) -> Tensor:
        """See the base class; a bare center is a box without size."""
        if reference.shape[-1] == 2:
            reference = functional.pad(reference, (0, 2))
        out: Tensor = self.position_mlp(reference)
        return out if self.limit is None else out.clamp(-self.limit, self.limit)
