"""LW-DETR's loss against the transformers library's: IoU-aware scores, the mean over groups."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor
from transformers.loss.loss_lw_detr import LwDetrForObjectDetectionLoss

from detr.models import GroupOutput, Proposals, QueryGroup, Target
from distill.losses.detection import detection_losses
from distill.losses.scores import iou_aware_loss
from distill.losses.weights import LossWeights

LAYERS, IMAGES, QUERIES, CLASSES, GROUPS = 3, 2, 9, 4, 3


def said(role: str, logits: Tensor, boxes: Tensor, proposed: tuple[Tensor, Tensor]) -> GroupOutput:
    count = logits.shape[2]
    hidden = torch.zeros(IMAGES, count, 8)
    proposals = Proposals(*proposed, torch.zeros(IMAGES, count, dtype=torch.int64), hidden)
    group = QueryGroup(role, hidden, boxes[0], proposals=proposals, blocks=count // QUERIES)
    return GroupOutput(group, list(logits), list(boxes), [], [])


@pytest.mark.parametrize("groups", [1, GROUPS])
def test_all_groups_cost_what_the_library_says(groups: int) -> None:
    torch.manual_seed(0)
    total = groups * QUERIES
    logits = torch.randn(LAYERS, IMAGES, total, CLASSES, requires_grad=True)
    boxes = 0.2 + 0.6 * torch.rand(LAYERS, IMAGES, total, 4)
    first_logits = torch.randn(IMAGES, total, CLASSES, requires_grad=True)
    first_boxes = boxes[0].flip(1)
    truth = [
        Target(0.2 + 0.6 * torch.rand(n, 4), torch.randint(CLASSES, (n,)), torch.zeros(0, 4))
        for n in (5, 2)
    ]
    theirs, _, _ = LwDetrForObjectDetectionLoss(
        logits[-1],
        [{"class_labels": t.labels, "boxes": t.boxes} for t in truth],
        torch.device("cpu"),
        boxes[-1],
        transformers.LwDetrConfig(num_labels=CLASSES, group_detr=groups),
        logits,
        boxes,
        first_logits,
        first_boxes,
    )
    own, further = slice(0, QUERIES), slice(QUERIES, None)
    outputs = {}
    for role, which in (("own", own), ("groups", further))[: min(groups, 2)]:
        proposed = first_logits[:, which], first_boxes[:, which]
        outputs[role] = said(role, logits[:, :, which], boxes[:, :, which], proposed)
    weights = LossWeights(scores="iou_aware")
    ours = sum(detection_losses(outputs, truth, torch.tensor(7.0), weights).values())
    assert isinstance(ours, Tensor)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    # Equal values might come with other gradients: the weight of the background has one.
    for found, wanted in zip(
        torch.autograd.grad(ours, [logits, first_logits]),
        torch.autograd.grad(theirs, [logits, first_logits]),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)


def test_large_logits_cost_finite_numbers() -> None:
    """The library's logarithm of a score that has become zero is none."""
    logits = torch.tensor([-200.0, 200.0, -200.0, 200.0], requires_grad=True)
    positive = torch.tensor([True, True, False, False])
    loss = iou_aware_loss(logits, torch.tensor([0.5, 0.5, 0.0, 0.0]), positive)
    loss.sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all() and loss.isfinite().all()
    assert loss[2:].tolist() == pytest.approx([0, 200])
