"""The error of self-attention maps against ordinary operations, gradient included."""

from __future__ import annotations

import pytest
import torch

from distill.methods.parts.attention_error import map_error


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("chosen", [None, [[3, 0, 2], [1, 2, 0]]])
def test_error_and_gradient(chosen: list[list[int]] | None, renormalize: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    ours = torch.rand(2, 2, 3, 3, generator=generator, requires_grad=True)
    theirs = torch.rand(2, 2, 4, 4, generator=generator, requires_grad=True)
    queries = None if chosen is None else torch.tensor(chosen)
    seen = theirs if chosen else theirs[..., :3, :3].contiguous()
    expected = torch.zeros(())
    for image in range(2):
        index = chosen[image] if chosen else [0, 1, 2]
        for head in range(2):
            goal = theirs[image, head][index][:, index].detach()
            if renormalize:
                goal = goal / goal.sum(1, keepdim=True)
            expected = expected + (ours[image, head] - goal).square().sum() / 36
    found = map_error(ours, seen, queries, renormalize)
    torch.testing.assert_close(found, expected)
    wanted = torch.autograd.grad(5 * expected, ours)[0]
    gradient, none = torch.autograd.grad(5 * found, (ours, theirs), allow_unused=True)
    torch.testing.assert_close(gradient, wanted)
    assert none is None  # the teacher learns nothing
