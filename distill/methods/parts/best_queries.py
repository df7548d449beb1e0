"""OD-DETR's auxiliary group: the teacher's best queries per object and decoder layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from detr.models import GroupOutput, QueryGroup, Target
from distill.losses.matches import Matches
from distill.profiler import timed


@dataclass
class BestQueries:
    """The queries of lowest cost for every object, per teacher layer ("stage").

    Attributes:
        teacher: Whose queries they are.
        index: ``[T, B, 2G]`` query; those of box j stand at ``j * per_box`` and after.
        padding: ``[B, 2G]`` bool, true for fillers.
        costs: ``[T, B, N, G]`` the teacher's matching costs.
        per_box: Queries per object.
    """

    teacher: GroupOutput
    index: Tensor
    padding: Tensor
    costs: Tensor
    per_box: int

    @property
    def stages(self) -> int:
        """T."""
        return len(self.index)

    def group(self, role: str, learned: bool) -> QueryGroup:
        """One block of queries per stage: updated content, predicted boxes as references.

        The content is the tensor that would enter the teacher's next layer. Learned queries keep
        the position of the query they come from; the others' follows the box.
        """
        own = self.teacher.group
        position = None
        if learned and own.position is not None:
            position = self._joined([own.position] * self.stages)
        return QueryGroup(
            role,
            content=self._joined(self.teacher.hidden),
            reference=self._joined(self.teacher.boxes),
            position=position,
            padding=self.padding.repeat(1, self.stages),
            blocks=self.stages,
        )

    def _joined(self, layers: Sequence[Tensor]) -> Tensor:
        """The chosen queries' rows of every stage, ``[B, T * 2G, ...]``."""
        parts = [
            x.detach().gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
            for x, index in zip(layers, self.index, strict=True)
        ]
        return torch.cat(parts, 1)


@timed("matching")
@torch.no_grad()
def best_queries(
    teacher: GroupOutput, targets: Sequence[Target], costs: Tensor, per_box: int
) -> BestQueries:
    """The ``per_box`` queries of lowest matching cost for every box, of every teacher layer.

    Args:
        teacher: Answers to its own queries.
        targets: Ground truth per image.
        costs: ``[T, B, N, G]`` matching costs of these answers.
        per_box: Queries per box.
    """
    per_box = min(per_box, costs.shape[2])
    index = costs.topk(per_box, dim=2, largest=False).indices
    counts = torch.tensor([len(target.labels) for target in targets])
    filler = (torch.arange(costs.shape[3]) >= counts[:, None]).to(costs.device, non_blocking=True)
    return BestQueries(
        teacher,
        index.transpose(2, 3).flatten(2),
        filler.repeat_interleave(per_box, 1),
        costs,
        per_box,
    )


def stages(stacked: Tensor, count: int) -> Tensor:
    """``[L, B, T * Q, ...]`` answers as ``[L * T, B, Q, ...]``: every stage like a layer."""
    return torch.unflatten(stacked, 2, (count, -1)).transpose(1, 2).flatten(0, 1)


@timed("matching")
@torch.no_grad()
def original_matches(
    chosen: BestQueries, teacher: Matches, targets: Sequence[Target], layers: int
) -> Matches:
    """The teacher's own matches among the chosen queries, the same in every student layer.

    Where the query the teacher matched to some box of an image is not among that box's chosen
    ones, the image's chosen queries are assigned anew by the teacher's costs, so that every box
    keeps one.

    Args:
        chosen: See :func:`best_queries`.
        teacher: The teacher's matches, of all its queries.
        targets: Ground truth per image.
        layers: Number of the student's layers.

    Returns:
        Matches in the layers of :func:`stages`: student layer times T plus stage.
    """
    boxes = chosen.costs.shape[3]
    slots = torch.unflatten(chosen.index, 2, (boxes, chosen.per_box))
    same = slots[teacher.layer, teacher.image, teacher.box] == teacher.query[:, None]
    lost = torch.zeros(slots.shape[:2], dtype=torch.int64, device=slots.device)
    lost.index_put_((teacher.layer, teacher.image), (~same.any(1)).long(), accumulate=True)
    missing = lost > 0
    present = (~missing[teacher.layer, teacher.image]).nonzero()[:, 0]
    kept = teacher.take(present)
    place = same[present].to(torch.int64).argmax(1)
    rows = [torch.stack((kept.layer, kept.image, kept.box * chosen.per_box + place, kept.box), 1)]
    for stage, image in missing.nonzero().tolist():
        count = len(targets[image].labels)
        index = chosen.index[stage, image, : count * chosen.per_box]
        table = chosen.costs[stage, image, index, :count].cpu().numpy()
        for slot, box in zip(*linear_sum_assignment(table), strict=True):
            rows.append(torch.tensor([[stage, image, int(slot), int(box)]], device=slots.device))
    table_ = torch.cat(rows).repeat(layers, 1)
    offset = torch.arange(layers, device=slots.device) * chosen.stages
    layer = table_[:, 0] + offset.repeat_interleave(len(table_) // layers)
    return Matches(layer, *table_[:, 1:].unbind(1))
