"""LW-DETR's queries: off the encoder's proposals, and in training several groups of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detr.config import DetectorConfig, GroupedQueriesConfig
from detr.models.heads.box_code import box_code
from detr.models.layers import inner_mlp
from detr.models.queries.proposals import AnchoredQueries, ProposalHead
from detr.models.structures import Memory, Proposals, QueryGroup


class GroupedQueries(AnchoredQueries):
    """Group DETR over proposals (Chen et al. 2023; LW-DETR section 3.1).

    Content is learned, and so is a step from the proposal to the box that all layers refer to. Each
    group has contents, steps and proposal heads of its own; after training the first answers alone.
    """

    def __init__(self, config: DetectorConfig, queries: GroupedQueriesConfig) -> None:
        super().__init__(config.width)
        self.number, self.groups = queries.number, queries.groups
        self.code = box_code(config.heads.boxes)
        self.proposals = ProposalHead(config, queries, class_agnostic=False)
        self.further = nn.ModuleList(
            ProposalHead(config, queries, class_agnostic=False) for _ in range(queries.groups - 1)
        )
        total = queries.number * queries.groups
        self.content = nn.Embedding(total, config.width)
        self.steps = nn.Embedding(total, 4)
        nn.init.zeros_(self.steps.weight)
        self.reference_mlp = inner_mlp(2 * config.width, config.width, config.width)

    def forward(self, memory: Memory, indices: Tensor | None = None) -> QueryGroup:
        """See the base class."""
        return self._group("own", self.proposals(memory, self.number, indices), 0)

    def training_groups(self, memory: Memory) -> list[QueryGroup]:
        """See the base class; adds ``groups``, all others in equal blocks."""
        own = self(memory)
        if not self.further:
            return [own]
        found = [head(memory, self.number) for head in self.further]
        joined = Proposals(
            torch.cat([one.logits for one in found], 1),
            torch.cat([one.boxes for one in found], 1),
            torch.cat([one.indices for one in found], 1),
            torch.cat([one.tokens for one in found], 1),
        )
        others = self._group("groups", joined, self.number)
        others.blocks = len(found)
        return [own, others]

    def _group(self, role: str, proposals: Proposals, first: int) -> QueryGroup:
        """Queries of some proposals; ``first`` is the number of the first one's content."""
        batch, count = proposals.boxes.shape[:2]
        which = slice(first, first + count)
        steps = self.steps.weight[which].expand(batch, -1, -1)
        reference = self.code.boxes(self.code.base(proposals.boxes.detach()), steps)
        content = self.content.weight[which].expand(batch, -1, -1)
        return QueryGroup(role, content, reference, proposals=proposals)
