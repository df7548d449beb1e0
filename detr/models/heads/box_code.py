"""What the numbers of a box head mean: where a box lies, seen from a reference."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from detr.config import AnyBoxesConfig, BoxesConfig, ScaledBoxesConfig
from detr.models.boxes import LOGIT_EPS, lift


class BoxCode(ABC):
    """Turns references and what a head says into boxes; has no weights."""

    nowhere: ClassVar[float]
    """Base of what may not become a box."""

    @abstractmethod
    def base(self, reference: Tensor) -> Tensor:
        """What a head's numbers are added to, ``[..., 4]``.

        Args:
            reference: ``[..., 2]`` or ``[..., 4]`` relative to the image; a bare center is a box of
                half the image.
        """

    @abstractmethod
    def boxes(self, base: Tensor, said: Tensor) -> Tensor:
        """Boxes ``[..., 4]`` cx cy w h of a base and a head's numbers."""


class OffsetCode(BoxCode):
    """Offsets in logits (Deformable DETR, section 4.2).

    Args:
        eps: How near to 0 and 1 a reference may come before its logit is taken.
    """

    # Its sigmoid is exactly 1, and half precision holds it, unlike infinity times zero.
    nowhere = 1e4

    def __init__(self, eps: float = LOGIT_EPS) -> None:
        self.eps = eps

    def base(self, reference: Tensor) -> Tensor:
        """See the base class."""
        return lift(reference, self.eps)

    def boxes(self, base: Tensor, said: Tensor) -> Tensor:
        """See the base class."""
        return (said + base).sigmoid()


class ScaledCode(BoxCode):
    """Steps in parts of the reference's size, and its size times an exponential (LW-DETR)."""

    nowhere = 0.0

    def base(self, reference: Tensor) -> Tensor:
        """See the base class."""
        if reference.shape[-1] == 4:
            return reference
        return torch.cat((reference, torch.full_like(reference, 0.5)), -1)

    def boxes(self, base: Tensor, said: Tensor) -> Tensor:
        """See the base class."""
        center, size = base.chunk(2, -1)
        step, growth = said.chunk(2, -1)
        return torch.cat((step * size + center, growth.exp() * size), -1)


def box_code(config: AnyBoxesConfig, eps: float | None = None) -> BoxCode:
    """The code of a config.

    Args:
        config: Of boxes.
        eps: Of logits, in the place of the config's.
    """
    if isinstance(config, ScaledBoxesConfig):
        return ScaledCode()
    assert isinstance(config, BoxesConfig)
    return OffsetCode(config.logit_eps if eps is None else eps)
