"""Mean squared error between self-attention maps, the teacher's re-indexed, map by map.

Maps of 900 x 900 queries for every head, layer and group are by far the largest tensors of D3ETR.
Done with ordinary operations, the teacher's re-indexed maps and the differences are written to
memory and kept for the gradient; here they exist for one map at a time, and again in the gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from detr.errors import UserError

_TINY = 1e-6


def check_heads(method: str, kind: str, ours: int, theirs: int, otherwise: str) -> None:
    """Raises UserError ``method-heads`` where maps of other numbers of heads are compared per head.

    Args:
        method: Name of the asking method.
        kind: Of attention, for the message.
        ours: Heads of the student.
        theirs: Heads of the teacher.
        otherwise: The option that does without.
    """
    if ours != theirs:
        raise UserError(
            "method-heads",
            f"methods.{method}: {kind}-attention maps are compared per head, but the student has "
            f"{ours} heads and the teacher {theirs}; set {otherwise}",
        )


def map_error(
    ours: Tensor, theirs: Tensor, queries: Tensor | None, renormalize: bool = False
) -> Tensor:
    """Mean squared error of the student's maps, a scalar with gradient to them only.

    Args:
        ours: ``[B, M, n, n]`` float32.
        theirs: ``[B, M, N, N]`` float32.
        queries: ``[B, n]`` the teacher's query for each of the student's; None in their order.
        renormalize: Scale the rows that are left of the teacher's maps back to one.
    """
    error: Tensor = _MapError.apply(ours, theirs, queries, renormalize)
    return error


def _blocks(
    ours: Tensor, theirs: Tensor, queries: Tensor | None, renormalize: bool
) -> Iterator[tuple[int, slice, Tensor]]:
    """Image, heads, and the difference of their maps: one map on a CPU's cache, all on a GPU."""
    together = 1 if ours.device.type == "cpu" else ours.shape[1]
    for image in range(len(ours)):
        for head in range(0, ours.shape[1], together):
            heads = slice(head, head + together)
            goal = theirs[image, heads]
            if queries is not None:
                chosen = queries[image]
                # Along the rows, gathering takes a third of the time index_select does.
                goal = goal.index_select(1, chosen)
                goal = goal.gather(2, chosen.expand(goal.shape[0], goal.shape[1], -1))
            if renormalize:
                goal = goal / goal.sum(-1, keepdim=True).clamp(min=_TINY)
            yield image, heads, ours[image, heads] - goal


class _MapError(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ours: Tensor, theirs: Tensor, queries: Tensor | None, renormalize: bool
    ) -> Tensor:
        ctx.save_for_backward(ours, theirs, queries)
        ctx.renormalize = renormalize
        total = ours.new_zeros(())
        for _, _, difference in _blocks(ours, theirs, queries, renormalize):
            flat = difference.flatten()
            total += flat.dot(flat)
        return total / ours.numel()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        ours, theirs, queries = ctx.saved_tensors
        found = torch.empty_like(ours)
        factor = gradients[0] * (2 / ours.numel())
        for image, heads, difference in _blocks(ours, theirs, queries, ctx.renormalize):
            torch.mul(difference, factor, out=found[image, heads])
        return found, None, None, None
