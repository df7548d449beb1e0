"""What every backbone is."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class AnyBackbone(nn.Module, ABC):
    """Makes maps of images.

    Attributes:
        channels: Of each map.
    """

    channels: tuple[int, ...]

    @abstractmethod
    def forward(self, images: Tensor, valid_sizes: Tensor) -> list[Tensor]:
        """Maps ``[B, C_v, H_v, W_v]``, finest first.

        Args:
            images: ``[B, 3, H, W]``, padded at the right and bottom.
            valid_sizes: ``[B, 2]`` (height, width) of the image inside the canvas; convolutions
                have no use for them.
        """
