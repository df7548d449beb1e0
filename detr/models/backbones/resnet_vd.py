"""PaddlePaddle's ResNet-vd, as far as it differs from timm's ``resnet18d`` and its like.

Their first block has a convolution on its shortcut even where nothing asks for one: in ResNet-18-vd
and 34-vd, whose first stage keeps both the size and the channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from detr.errors import UserError

# Where timm has the shortcut of the first block.
_PLACE = "layer1.0.downsample."


def add_first_projection(body: Any) -> None:
    """Gives the first block of a timm ResNet a shortcut that starts as the identity.

    Raises:
        UserError: ``backbone-options`` for a backbone that is no ResNet, or one that has it anyway.
    """
    stage: Any = getattr(body, "layer1", None)
    block: Any = stage[0] if isinstance(stage, nn.Sequential) else None
    if block is None or getattr(block, "downsample", block) is not None:
        raise UserError(
            "backbone-options",
            "backbone.first_projection: only ResNets whose first stage keeps its channels, such as "
            "resnet18d and resnet34d, have room for one",
        )
    channels = block.conv1.in_channels
    conv = nn.Conv2d(channels, channels, 1, bias=False)
    with torch.no_grad():
        nn.init.dirac_(conv.weight)
    block.downsample = nn.Sequential(nn.Identity(), conv, nn.BatchNorm2d(channels))


def with_first_projection(body: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published weights, with the identity where they have no shortcut in the first block."""
    own = {name: x for name, x in body.state_dict().items() if name.startswith(_PLACE)}
    return {**own, **tensors}
