"""LW-DETR's queries: off the encoder's proposals, and in training several groups of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detr.config import DetectorConfig, GroupedQueriesConfig
from detr.models.heads.box_code import BoxCode, box_code
from detr.models.layers import inner_mlp
from detr.models.queries.proposals import AnchoredQueries, ProposalHead
from detr.models.structures import Memory, Proposals, QueryGroup


class _Group(nn.Module):
    """One group: its proposal heads, contents, and steps from the proposals to the boxes."""

    def __init__(self, config: DetectorConfig, queries: GroupedQueriesConfig) -> None:
        super().__init__()
        self.proposals, self.content, self.steps = _parts(config, queries)


def _parts(
    config: DetectorConfig, queries: GroupedQueriesConfig
) -> tuple[ProposalHead, nn.Embedding, nn.Embedding]:
    """What a group is made of; steps start at none."""
    steps = nn.Embedding(queries.number, 4)
    nn.init.zeros_(steps.weight)
    content = nn.Embedding(queries.number, config.width)
    return ProposalHead(config, queries, class_agnostic=False), content, steps


class GroupedQueries(AnchoredQueries):
    """Group DETR over proposals (Chen et al. 2023; LW-DETR section 3.1).

    Content is learned, and so is a step from the proposal to the box that all layers refer to. Each
    group has contents, steps and proposal heads of its own; after training the first answers alone.
    """

    def __init__(self, config: DetectorConfig, queries: GroupedQueriesConfig) -> None:
        super().__init__(config.width)
        self.number = queries.number
        self.code: BoxCode = box_code(config.heads.boxes)
        self.proposals, self.content, self.steps = _parts(config, queries)
        self.further = nn.ModuleList(_Group(config, queries) for _ in range(queries.groups - 1))
        self.reference_mlp = inner_mlp(2 * config.width, config.width, config.width)

    def forward(self, memory: Memory, indices: Tensor | None = None) -> QueryGroup:
        """See the base class."""
        return self._asked("own", self, memory, indices)

    def training_groups(self, memory: Memory) -> list[QueryGroup]:
        """See the base class; adds ``groups``, all others in equal blocks."""
        own = self(memory)
        found = [self._asked("groups", group, memory, None) for group in self.further]
        if not found:
            return [own]
        proposed = [one.proposals for one in found if one.proposals is not None]
        joined = Proposals(
            torch.cat([one.logits for one in proposed], 1),
            torch.cat([one.boxes for one in proposed], 1),
            torch.cat([one.indices for one in proposed], 1),
            torch.cat([one.tokens for one in proposed], 1),
        )
        content, reference = (
            torch.cat(parts, 1)
            for parts in ([one.content for one in found], [one.reference for one in found])
        )
        others = QueryGroup("groups", content, reference, blocks=len(found), proposals=joined)
        return [own, others]

    def _asked(
        self, role: str, group: nn.Module, memory: Memory, indices: Tensor | None
    ) -> QueryGroup:
        """The queries of one group."""
        assert isinstance(group, GroupedQueries | _Group)
        proposals = group.proposals(memory, self.number, indices)
        batch = len(proposals.boxes)
        steps = group.steps.weight.expand(batch, -1, -1)
        reference = self.code.boxes(self.code.base(proposals.boxes.detach()), steps)
        content = group.content.weight.expand(batch, -1, -1)
        return QueryGroup(role, content, reference, proposals=proposals)
