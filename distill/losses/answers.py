"""What the loss looks at of a group: all layers at once, and what was said before them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from detr.models import GroupOutput
from distill.losses.masks import MaskPredictions, Points, masks_of


class Answers(NamedTuple):
    """What a group says, layer by layer, after what it says before the first one, if it does.

    Attributes:
        logits: ``[L, B, N, K]``.
        boxes: ``[L, B, N, 4]`` cx cy w h.
        masks: In a detector with masks.
    """

    logits: Tensor
    boxes: Tensor
    masks: MaskPredictions | None


def answers(output: GroupOutput, points: Points) -> Answers:
    """What the loss looks at of a group.

    Args:
        output: Of the decoder.
        points: How masks are compared.
    """
    initial = [] if output.initial is None else [output.initial]
    logits = torch.stack([*(x.logits for x in initial), *output.logits])
    boxes = torch.stack([*(x.boxes for x in initial), *output.boxes])
    return Answers(logits, boxes, masks_of(output, points))
