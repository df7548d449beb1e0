"""Ground truth of a batch as tensors: padded to the longest image, or all in one row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from detr.models import Target, cxcywh_to_xyxy
from distill.losses.matches import Matches
from distill.losses.overlap import iou


def pad_targets(targets: Sequence[Target]) -> tuple[Tensor, Tensor, Tensor]:
    """Stacks ground truth of different lengths.

    Returns:
        ``[B, G, 4]`` boxes and ``[B, G]`` labels, filled up with zeros to the longest image, and
        the ``[B]`` counts (CPU).
    """
    counts = torch.tensor([len(target.labels) for target in targets])
    boxes = torch.nn.utils.rnn.pad_sequence([t.boxes for t in targets], batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence([t.labels for t in targets], batch_first=True)
    return boxes, labels, counts


@dataclass
class JoinedTargets:
    """Ground truth of all images in one row.

    Attributes:
        boxes: ``[sum of G, 4]``.
        labels: ``[sum of G]``.
        offsets: ``[B]`` where each image begins.
    """

    boxes: Tensor
    labels: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, targets: Sequence[Target]) -> JoinedTargets:
        """Joins the images."""
        counts = [len(target.labels) for target in targets]
        device = targets[0].labels.device
        return cls(
            torch.cat([target.boxes for target in targets]),
            torch.cat([target.labels for target in targets]),
            torch.tensor([0, *counts[:-1]]).cumsum(0).to(device, non_blocking=True),
        )

    def of_pairs(self, matches: Matches) -> tuple[Tensor, Tensor]:
        """Box and label of every pair."""
        flat = self.offsets[matches.image] + matches.box
        return self.boxes[flat], self.labels[flat]


def pair_iou(boxes: Tensor, matches: Matches, truth: JoinedTargets) -> Tensor:
    """``[M]`` IoU of the matched predictions with their boxes, in [0, 1], without gradient."""
    found = boxes[matches.layer, matches.image, matches.query].detach().float()
    overlap = iou(cxcywh_to_xyxy(found), cxcywh_to_xyxy(truth.of_pairs(matches)[0]))
    return overlap.clamp(0, 1)
