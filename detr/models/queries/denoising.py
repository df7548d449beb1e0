"""Denoising queries (DN-DETR, section 4; contrastive: DINO, section 3.3)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from detr.config import (
    ContrastiveDenoisingConfig,
    DetectorConfig,
    PlainDenoisingConfig,
    UnifiedDenoisingConfig,
)
from detr.config.queries import DenoisingConfig
from detr.models.boxes import LOGIT_EPS, cxcywh_to_xyxy, xyxy_to_cxcywh
from detr.models.structures import Denoising, QueryGroup, Target


class Denoiser(nn.Module, ABC):
    """Makes a group of noised ground truth for the decoder to repair.

    The group is ``groups`` blocks; each block is ``sides`` times the batch's largest box count G:
    positives and, where the denoising is contrastive, as many negatives. Images with fewer boxes
    are filled up with padding.

    Args:
        config: Of the noise.
        num_classes: K.
        width: D.
        eps: How near to 0 and 1 a reference may come.

    Attributes:
        sides: Queries that one box has in a block.
        channels: Uniform numbers that each of them draws.
        indicator: Channels of the content that say what a query is for.
    """

    sides: ClassVar[int]
    channels: ClassVar[int]
    indicator: ClassVar[int]

    def __init__(
        self, config: DenoisingConfig, num_classes: int, width: int, eps: float = LOGIT_EPS
    ) -> None:
        super().__init__()
        self.num_classes, self.eps = num_classes, eps
        self.label_noise, self.box_noise = config.label_noise, config.box_noise
        # With an indicator: one more label for "unknown".
        self.label_embedding = nn.Embedding(num_classes + self.indicator, width - self.indicator)

    def contents(self) -> Tensor:
        """Content ``[K, D]`` of a denoising query of each class."""
        return self._marked(self.label_embedding.weight[: self.num_classes])

    def _marked(self, content: Tensor) -> Tensor:
        """Embeddings of labels with the indicator of denoising queries, 1."""
        return functional.pad(content, (0, 1), value=1.0) if self.indicator else content

    @abstractmethod
    def groups(self, most: int) -> int:
        """Number of groups for a largest box count; none where there is no room for them."""

    @abstractmethod
    def noisy_boxes(self, boxes: Tensor, drawn: Tensor) -> Tensor:
        """Boxes moved at random.

        Args:
            boxes: ``[B, groups, sides, G, 4]`` cx cy w h.
            drawn: ``[B, groups, sides, G, channels - 2]`` uniform numbers.

        Returns:
            The boxes' shape and format, within the range a reference logit can hold.
        """

    def forward(
        self,
        targets: list[Target],
        generators: Sequence[torch.Generator] | None = None,
        most: int = 0,
    ) -> QueryGroup | None:
        """The denoising group of a batch, or ``None`` where no image has a box.

        An image's noise depends on its boxes, its generator and the number of groups alone, not on
        the images it is in a batch with.

        Args:
            targets: One per image, on the module's device.
            generators: Source of each image's noise, on the CPU; the default generator otherwise.
            most: Largest box count among all processes' images, if that is more than this batch's:
                it decides how many groups the budget allows.
        """
        most = max(most, *(len(target.labels) for target in targets))
        if most == 0:
            return None
        groups = self.groups(most)
        if groups == 0:
            return None
        labels, boxes, padding = _stack(targets, most)

        def tiled(x: Tensor) -> Tensor:
            """``[B, G, ...]`` to ``[B, groups, sides, G, ...]``."""
            return x[:, None, None].expand(-1, groups, self.sides, *x.shape[1:])

        drawn = self._drawn(targets, generators, groups, most).to(boxes.device, non_blocking=True)
        noisy_labels = self._noisy_labels(tiled(labels), drawn[..., :2])
        noisy_boxes = self.noisy_boxes(tiled(boxes), drawn[..., 2:])
        filler = tiled(padding).flatten(1)
        content = self._marked(self.label_embedding(noisy_labels.flatten(1)))
        return QueryGroup(
            role="denoising",
            content=content.masked_fill(filler[..., None], 0.0),
            reference=noisy_boxes.flatten(1, 3),
            padding=filler,
            blocks=groups,
            sees="own",
            denoising=Denoising(groups=groups, size=self.sides * most),
        )

    def _drawn(
        self,
        targets: list[Target],
        generators: Sequence[torch.Generator] | None,
        groups: int,
        most: int,
    ) -> Tensor:
        """``[B, groups, sides, G, channels]`` uniform numbers in [0, 1) on the CPU.

        Of a query: whether its label changes, into which; then what its box needs.
        """
        drawn = torch.zeros(len(targets), groups, self.sides, most, self.channels)
        sources: Sequence[torch.Generator | None] = generators or [None] * len(targets)
        for row, target, source in zip(drawn, targets, sources, strict=True):
            count = len(target.labels)
            shape = (groups, self.sides, count, self.channels)
            row[:, :, :count] = torch.rand(shape, generator=source)
        return drawn

    def _noisy_labels(self, labels: Tensor, drawn: Tensor) -> Tensor:
        """Replaces labels by uniformly drawn ones with the configured probability.

        Args:
            labels: ``[...]``.
            drawn: ``[..., 2]`` uniform numbers.
        """
        other = (drawn[..., 1] * self.num_classes).long().clamp(max=self.num_classes - 1)
        return torch.where(drawn[..., 0] < self.label_noise, other, labels)


class ContrastiveDenoiser(Denoiser):
    """DINO's: query ``block * 2G + j`` is box j's positive, ``block * 2G + G + j`` its negative."""

    sides = 2
    channels = 10  # of the box: sizes and signs of four shifts
    indicator = 0

    def __init__(
        self,
        config: ContrastiveDenoisingConfig,
        num_classes: int,
        width: int,
        eps: float = LOGIT_EPS,
    ) -> None:
        super().__init__(config, num_classes, width, eps)
        self.number, self.farther = config.number, float(config.harder_negatives)

    def groups(self, most: int) -> int:
        """See the base class: what the budget of positives allows, at least one."""
        return max(1, self.number // most)

    def noisy_boxes(self, boxes: Tensor, drawn: Tensor) -> Tensor:
        """Moves every corner by 0..1 (positives) or 1..2 (harder negatives) half sizes either way.

        See the base class.
        """
        half = boxes[..., 2:].repeat(1, 1, 1, 1, 2) / 2
        negative = self.farther * torch.arange(2, device=boxes.device).view(2, 1, 1)
        sign = torch.where(drawn[..., 4:] < 0.5, -1.0, 1.0)
        size = drawn[..., :4] + negative
        corners = cxcywh_to_xyxy(boxes) + size * sign * half * self.box_noise
        # A negative's corners may cross: such a box keeps its center and the smallest size.
        return xyxy_to_cxcywh(corners.clamp(0, 1)).clamp(self.eps, 1 - self.eps)


class PositiveDenoiser(Denoiser):
    """Positives alone, with DN-DETR's noise on their boxes."""

    sides = 1
    channels = 6  # of the box: four shifts

    def noisy_boxes(self, boxes: Tensor, drawn: Tensor) -> Tensor:
        """Moves centers by up to half a size and scales sizes, each times the noise (section 4.2).

        See the base class.
        """
        reach = torch.cat((boxes[..., 2:] / 2, boxes[..., 2:]), -1) * self.box_noise
        return (boxes + (2 * drawn - 1) * reach).clamp(self.eps, 1 - self.eps)


class PlainDenoiser(PositiveDenoiser):
    """DN-DETR's.

    The last channel of the content is an indicator, 1 for denoising queries and 0 for the others,
    whose label is "unknown": see :meth:`unknown`.
    """

    indicator = 1

    def __init__(
        self, config: PlainDenoisingConfig, num_classes: int, width: int, eps: float = LOGIT_EPS
    ) -> None:
        super().__init__(config, num_classes, width, eps)
        self.number = config.groups

    def unknown(self) -> Tensor:
        """Content ``[D]`` of queries that are not for denoising."""
        return functional.pad(self.label_embedding.weight[self.num_classes], (0, 1))

    def groups(self, most: int) -> int:
        """See the base class: the same number, whatever the crowd."""
        return self.number


class UnifiedDenoiser(PositiveDenoiser):
    """Mask DINO's: as many groups as a budget allows, and no indicator."""

    indicator = 0

    def __init__(
        self, config: UnifiedDenoisingConfig, num_classes: int, width: int, eps: float = LOGIT_EPS
    ) -> None:
        super().__init__(config, num_classes, width, eps)
        self.number = config.number

    def groups(self, most: int) -> int:
        """See the base class: what the budget allows, which may be none."""
        return self.number // most


_DENOISERS: dict[type, Callable[[Any, int, int, float], Denoiser]] = {
    ContrastiveDenoisingConfig: ContrastiveDenoiser,
    PlainDenoisingConfig: PlainDenoiser,
    UnifiedDenoisingConfig: UnifiedDenoiser,
}


def build_denoiser(config: DetectorConfig) -> Denoiser | None:
    """A new denoiser of a detector, if its queries have one."""
    noise = config.queries.noise
    if noise is None:
        return None
    eps = config.heads.boxes.logit_eps
    return _DENOISERS[type(noise)](noise, config.num_classes, config.width, eps)


def _stack(targets: list[Target], most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Labels ``[B, G]``, boxes ``[B, G, 4]`` and padding ``[B, G]`` of a batch."""
    device = targets[0].boxes.device
    labels = torch.zeros(len(targets), most, dtype=torch.int64, device=device)
    boxes = torch.full((len(targets), most, 4), 0.5, device=device)
    padding = torch.ones(len(targets), most, dtype=torch.bool, device=device)
    for i, target in enumerate(targets):
        count = len(target.labels)
        labels[i, :count] = target.labels
        boxes[i, :count] = target.boxes
        padding[i, :count] = False
    return labels, boxes, padding
