"""Queries from the encoder's proposals."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from detr.config import (
    DetectorConfig,
    MixedQueriesConfig,
    SelectedQueriesConfig,
    TwoStageQueriesConfig,
    UnifiedQueriesConfig,
)
from detr.config.queries import ProposedQueriesConfig
from detr.errors import UserError
from detr.models.boxes import LOGIT_EPS
from detr.models.geometry import token_centers
from detr.models.heads.box_code import BoxCode, box_code
from detr.models.heads.boxes import box_head
from detr.models.heads.classes import class_head
from detr.models.heads.masks import boxes_of
from detr.models.heads.shared import Heads
from detr.models.layers import MLP, TokenLinear, inner_mlp
from detr.models.queries.position import XYWH, YXWH, reference_embedding
from detr.models.queries.sources import QuerySource
from detr.models.structures import LevelShapes, Memory, Proposals, QueryGroup

# Score of tokens that may not propose, which half precision holds.
_NEVER = -1e4


class TokenChoice(nn.Module):
    """Which of the encoder's tokens become queries (Deformable DETR, appendix A.4).

    Args:
        config: The detector.
        queries: Of the detector.
        coarse_to_fine: See :func:`default_boxes`.
    """

    def __init__(
        self,
        config: DetectorConfig,
        queries: ProposedQueriesConfig,
        coarse_to_fine: bool = False,
    ) -> None:
        super().__init__()
        self.code: BoxCode = box_code(config.heads.boxes, LOGIT_EPS)
        width = config.width
        self.everywhere = queries.proposal_tokens == "all"
        self.coarse_to_fine = coarse_to_fine
        self.projects = queries.projects_tokens
        if self.projects:
            self.project = TokenLinear(width)
            self.norm = nn.LayerNorm(width)

    def start(self) -> None:
        """First values of the projection."""
        if self.projects:
            nn.init.xavier_uniform_(self.project.weight)
            nn.init.zeros_(self.project.bias)

    def choose(
        self,
        memory: Memory,
        count: int,
        indices: Tensor | None,
        judge: Callable[[Tensor], tuple[Tensor, Tensor]],
    ) -> Chosen:
        """Chooses the best ``count`` tokens, best first, or takes those it is given.

        Tokens in the padding, or whose default box leaves (0.01, 0.99), have zero content and no
        box. They take part when there are not enough others, or where the config lets all propose.

        Args:
            memory: The batch.
            count: N.
            indices: ``[B, N]`` tokens in place of the best ones.
            judge: From tokens ``[B, S, D]`` to class logits ``[B, S, K]`` and scores ``[B, S]``.

        Raises:
            UserError: ``too-few-tokens`` where the canvas has fewer tokens than queries.
        """
        size = memory.tokens.shape[1]
        if size < count:
            raise UserError(
                "too-few-tokens",
                f"the canvas has {size} encoder tokens ({_cells(memory)}), fewer than queries: "
                f"{count}; "
                "use a larger image size or fewer queries",
            )
        defaults, allowed = default_boxes(memory.valid_ratios, memory.shapes, self.coarse_to_fine)
        allowed = allowed & ~memory.padding[..., None]
        if self.projects:
            # As if those not allowed were zero before.
            projected = self.project(memory.tokens, memory.shapes)
            tokens = self.norm(torch.where(allowed, projected, self.project.bias))
        else:
            tokens = memory.tokens.masked_fill(~allowed, 0.0)
        logits, scores = judge(tokens)
        scores = scores.detach()
        if not self.everywhere:
            scores = scores.masked_fill(~allowed[..., 0], _NEVER)
        if indices is None:
            indices = scores.topk(count, dim=1).indices

        def chosen(x: Tensor) -> Tensor:
            return x.gather(1, indices[..., None].expand(-1, -1, x.shape[-1]))

        base = self.code.base(defaults).masked_fill(~allowed, self.code.nowhere)
        return Chosen(indices, chosen(tokens), chosen(logits), chosen(base))


class Chosen(NamedTuple):
    """Tokens that become queries.

    Attributes:
        indices: ``[B, N]`` which.
        tokens: ``[B, N, D]``.
        logits: ``[B, N, K]``.
        base: ``[B, N, 4]`` their default boxes, in the terms of the box head.
    """

    indices: Tensor
    tokens: Tensor
    logits: Tensor
    base: Tensor


class ProposalHead(TokenChoice):
    """Scores every encoder token and turns the best into boxes, by heads of its own.

    Args:
        config: The detector.
        queries: Its queries.
        class_agnostic: Rank by the first class channel, which the loss then trains as "any
            object" (Deformable DETR two-stage); otherwise by the best class (DINO).
    """

    def __init__(
        self, config: DetectorConfig, queries: ProposedQueriesConfig, class_agnostic: bool
    ) -> None:
        super().__init__(config, queries)
        self.class_agnostic = class_agnostic
        self.class_head = class_head(config)
        self.box_head = box_head(config.width)
        self.start()

    def forward(self, memory: Memory, count: int, indices: Tensor | None = None) -> Proposals:
        """See :meth:`TokenChoice.choose`."""
        found = self.choose(memory, count, indices, self._judge)
        # Only the chosen tokens go through the box head: the others' boxes are never read.
        boxes = self.code.boxes(found.base, self.box_head(found.tokens))
        return Proposals(found.logits, boxes, found.indices, found.tokens, self.class_agnostic)

    def _judge(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.class_head(tokens)
        return logits, logits[..., 0] if self.class_agnostic else logits.amax(-1)


def default_boxes(
    ratios: Tensor, shapes: LevelShapes, coarse_to_fine: bool = False
) -> tuple[Tensor, Tensor]:
    """The box every token starts from: its cell's center, side ``0.05 * 2 ** level``.

    Args:
        ratios: ``[B, V, 2]`` valid ratios.
        shapes: (height, width) of the levels.
        coarse_to_fine: Count levels from the coarsest on.

    Returns:
        Boxes ``[B, S, 4]`` and whether they lie within (0.01, 0.99), ``[B, S, 1]``.
    """
    centers = token_centers(ratios, shapes)
    levels = range(len(shapes))
    sides = [
        centers.new_full((1, height * width, 2), 0.05 * 2.0**level)
        for level, (height, width) in zip(
            reversed(levels) if coarse_to_fine else levels, shapes, strict=True
        )
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


class AnchoredQueries(QuerySource):
    """Queries whose position is an MLP of the sine code of their box on the canvas (DINO)."""

    position_follows_reference = True

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.reference_mlp: nn.Module

    def position(self, reference: Tensor, memory: Memory) -> Tensor:
        """See the base class; the reference as it lies on the padded canvas of level 0."""
        scale = memory.valid_ratios[:, :1].repeat(1, 1, 2)
        embedding = reference_embedding(reference * scale, YXWH, self.width // 2)
        out: Tensor = self.reference_mlp(embedding)
        return out


class MixedQueries(AnchoredQueries):
    """DINO's mixed query selection: anchors from the encoder, content learned (section 3.4)."""

    def __init__(self, config: DetectorConfig, queries: MixedQueriesConfig) -> None:
        super().__init__(config.width)
        self.number = queries.number
        self.proposals = ProposalHead(config, queries, class_agnostic=False)
        self.content = nn.Embedding(queries.number, config.width)
        self.reference_mlp = inner_mlp(2 * config.width, config.width, config.width)
        nn.init.xavier_uniform_(self.content.weight)

    def forward(self, memory: Memory, indices: Tensor | None = None) -> QueryGroup:
        """See the base class."""
        proposals = self.proposals(memory, self.number, indices)
        content = self.content.weight[None].expand(memory.tokens.shape[0], -1, -1)
        return QueryGroup("own", content, proposals.boxes.detach(), proposals=proposals)


class UnifiedQueries(AnchoredQueries):
    """Mask DINO's query selection (section 3.3): content and anchors from tokens.

    The decoder's own heads judge the tokens: by their class logits they are chosen, and of the
    chosen ones, after the decoder's norm, the loss gets logits and masks, whose boxes may be the
    anchors.
    """

    def __init__(self, config: DetectorConfig, queries: UnifiedQueriesConfig) -> None:
        super().__init__(config.width)
        self.number, self.initial_boxes = queries.number, queries.initial_boxes
        self.proposals = TokenChoice(config, queries, queries.coarse_to_fine)
        self.proposals.start()
        self.reference_mlp = inner_mlp(2 * config.width, config.width, config.width)
        self._heads: Heads | None = None

    def judge_by(self, heads: Heads) -> None:
        """See the base class."""
        self._heads = heads

    def forward(self, memory: Memory, indices: Tensor | None = None) -> QueryGroup:
        """See the base class."""
        heads = self._heads
        assert heads is not None
        found = self.proposals.choose(memory, self.number, indices, self._judge)
        boxes = self.proposals.code.boxes(found.base, heads.boxes(found.tokens))
        logits, masks = heads.of(found.tokens)
        proposals = Proposals(logits, boxes, found.indices, found.tokens, masks=masks)
        anchors = boxes.detach()
        if self.initial_boxes != "predicted" and memory.pixels is not None:
            assert masks is not None
            mask_logits = memory.pixels.masks(masks.detach()).detach()
            anchors = boxes_of(mask_logits, memory.pixels, self.initial_boxes == "bitmask")
            anchors = anchors.clamp(LOGIT_EPS, 1 - LOGIT_EPS)
        return QueryGroup("own", found.tokens.detach(), anchors, proposals=proposals)

    def _judge(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        assert self._heads is not None
        logits = self._heads.classes(tokens)
        return logits, logits.amax(-1)


class SelectedQueries(QuerySource):
    """RT-DETR's query selection: content and anchors from the chosen tokens, both without gradient.

    Positions are an MLP of the boxes themselves, without a sine code.
    """

    def __init__(self, config: DetectorConfig, queries: SelectedQueriesConfig) -> None:
        super().__init__()
        self.position_follows_reference = not queries.positions_stay
        self.number, self.limit = queries.number, queries.position_limit
        self.proposals = ProposalHead(config, queries, class_agnostic=False)
        width, layers = config.width, queries.position_layers
        self.position_mlp = MLP(4, *([2 * width] if layers == 2 else [width] * 2), width)
        # The first two alone, as in DEIM's code.
        for layer in self.position_mlp.layers[:2]:
            assert isinstance(layer, nn.Linear)
            nn.init.xavier_uniform_(layer.weight)

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


def _cells(memory: Memory) -> str:
    """Cells of the maps, finest first, by which a canvas is known."""
    return " and ".join(f"{height}x{width}" for height, width in memory.shapes)
