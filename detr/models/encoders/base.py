"""What every encoder is."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import nn

from detr.models.structures import Levels, Memory


class Encoder(nn.Module, ABC):
    """Stands between the neck's maps and the decoder's memory."""

    @abstractmethod
    def encode(self, levels: Levels) -> Memory:
        """The memory of a batch; its ``features`` are left to the detector.

        An encoder may work on maps or on tokens; see :class:`Levels`.
        """
