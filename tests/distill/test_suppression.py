"""Suppression of duplicates at evaluation, and statistics shared by processes."""

from __future__ import annotations

import torch

from distill.distributed import shared_statistic
from distill.evaluate import suppress


def test_only_a_better_box_of_the_same_class_suppresses() -> None:
    # Two boxes of IoU 0.9, once of one class and once of two; a third of IoU 0.5 stays.
    boxes = torch.tensor([[0.0, 0, 10, 10], [0.0, 0, 10, 9], [0.0, 0, 10, 9], [0.0, 0, 10, 5]])
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6])
    labels = torch.tensor([0, 0, 1, 0])
    kept = suppress(boxes, scores, labels, 0.8)
    assert kept[2].tolist() == [0, 1, 0]
    torch.testing.assert_close(kept[1], torch.tensor([0.9, 0.7, 0.6]))
    assert len(suppress(boxes, scores, labels, 0.95)[0]) == 4


def test_a_shared_statistic_passes_its_gradient() -> None:
    value = torch.tensor([1.0, 2.0], requires_grad=True)
    shared = shared_statistic(value)
    assert shared.tolist() == [1.0, 2.0]
    (shared * torch.tensor([3.0, 5.0])).sum().backward()
    assert value.grad is not None and value.grad.tolist() == [3.0, 5.0]
