"""RT-DETR's loss against the transformers library's."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers.loss.loss_rt_detr import RTDetrForObjectDetectionLoss

from detr.models import GroupOutput, Proposals, QueryGroup, Target
from distill.losses.detection import detection_losses
from distill.losses.weights import LossWeights

LAYERS, IMAGES, QUERIES, CLASSES = 3, 2, 9, 4


def test_own_queries_and_proposals_cost_what_the_library_says() -> None:
    torch.manual_seed(0)
    logits = torch.randn(LAYERS, IMAGES, QUERIES, CLASSES)
    boxes = 0.2 + 0.6 * torch.rand(LAYERS, IMAGES, QUERIES, 4)
    first_logits, first_boxes = torch.randn(IMAGES, QUERIES, CLASSES), boxes[0].flip(1)
    truth = [
        Target(0.2 + 0.6 * torch.rand(n, 4), torch.randint(CLASSES, (n,)), torch.zeros(0, 4))
        for n in (5, 2)
    ]
    theirs, _, _ = RTDetrForObjectDetectionLoss(
        logits[-1],
        [{"class_labels": t.labels, "boxes": t.boxes} for t in truth],
        torch.device("cpu"),
        boxes[-1],
        transformers.RTDetrConfig(num_labels=CLASSES),
        logits.transpose(0, 1),
        boxes.transpose(0, 1),
        enc_topk_logits=first_logits,
        enc_topk_bboxes=first_boxes,
    )
    hidden = torch.zeros(IMAGES, QUERIES, 8)
    proposals = Proposals(
        first_logits, first_boxes, torch.zeros(IMAGES, QUERIES, dtype=torch.int64), hidden
    )
    group = QueryGroup("own", hidden, first_boxes, proposals=proposals)
    output = GroupOutput(group, list(logits), list(boxes), [], [])
    weights = LossWeights(scores="varifocal")
    ours = detection_losses({"own": output}, truth, torch.tensor(7.0), weights)
    assert sum(map(float, ours.values())) == pytest.approx(float(theirs), rel=1e-5)
