"""Exponential moving average of a detector's weights."""

from __future__ import annotations

import copy

import torch

from detr.models import Detector


class Ema:
    """A copy of a detector that follows it slowly; what is evaluated and saved.

    The decay rises from 0 to its final value over the first steps, so the random initial weights
    are forgotten even in a short run; OD-DETR's teacher keeps it constant from the start. Running
    statistics are averaged like weights.

    Args:
        model: The detector to follow.
        decay: Final decay per step.
        rising: Whether the decay rises to its final value; otherwise it is constant.
    """

    def __init__(self, model: Detector, decay: float, rising: bool = True) -> None:
        self.decay, self.rising = decay, rising
        self.model: Detector = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: Detector, step: int) -> None:
        """Moves towards the model after its step number ``step`` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step)) if self.rising else self.decay
        mine, theirs = self.model.state_dict(), model.state_dict()
        floats = [k for k, v in mine.items() if v.is_floating_point()]
        torch._foreach_lerp_([mine[k] for k in floats], [theirs[k] for k in floats], 1 - decay)
        for key in mine.keys() - set(floats):
            mine[key].copy_(theirs[key])
