"""Suppression of duplicates at evaluation, and statistics shared by processes."""

from __future__ import annotations

import numpy as np
import torch
from torchvision.ops import batched_nms

from detr.suppression import suppress
from detr.types import Detections
from distill.distributed import shared_statistic


def test_only_a_better_box_of_the_same_class_suppresses() -> None:
    # Two boxes of IoU 0.9, once of one class and once of two; a third of IoU 0.5 stays.
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 9], [0, 0, 10, 5]], np.float32)
    scores = np.array([0.9, 0.8, 0.7, 0.6], np.float32)
    found = Detections(boxes, scores, np.array([0, 0, 1, 0]))
    kept = suppress(found, 0.8)
    assert kept.labels.tolist() == [0, 1, 0]
    np.testing.assert_array_equal(kept.scores, scores[[0, 2, 3]])
    assert len(suppress(found, 0.95)) == 4


def test_suppression_is_torchvisions() -> None:
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(300, 4, generator=generator) * 20
    boxes = torch.cat((corners[:, :2], corners[:, :2] + 5 + corners[:, 2:]), 1)
    scores = torch.rand(300, generator=generator).sort(descending=True).values
    labels = torch.randint(3, (300,), generator=generator)
    kept = batched_nms(boxes, scores, labels, 0.5)
    found = suppress(Detections(boxes.numpy(), scores.numpy(), labels.numpy()), 0.5)
    assert 10 < len(kept) < 300
    np.testing.assert_array_equal(found.boxes, boxes[kept].numpy())


def test_a_shared_statistic_passes_its_gradient() -> None:
    value = torch.tensor([1.0, 2.0], requires_grad=True)
    shared = shared_statistic(value)
    assert shared.tolist() == [1.0, 2.0]
    (shared * torch.tensor([3.0, 5.0])).sum().backward()
    assert value.grad is not None and value.grad.tolist() == [3.0, 5.0]
