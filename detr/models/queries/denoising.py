"""Denoising queries (DN-DETR, section 4; contrastive: DINO, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from detr.config import DenoisingConfig
from detr.models.boxes import LOGIT_EPS, cxcywh_to_xyxy, xyxy_to_cxcywh
from detr.models.structures import Denoising, QueryGroup, Target


class Denoiser(nn.Module):
    """Makes a group of noised ground truth for the decoder to repair.

    The group is ``groups`` blocks; each block is ``[positives | negatives]`` of the batch's largest
    box count G, so query ``block * 2G + j`` is the positive of box j and ``block * 2G + G + j`` its
    negative; without contrast, there are no negatives. Images with fewer boxes are filled up with
    padding.

    Without contrast (DN-DETR) the last channel of the content is an indicator, 1 for denoising
    queries and 0 for the others, whose label is "unknown": see :meth:`unknown`.

    Args:
        config: Noise and budget.
        num_classes: K.
        width: D.
        eps: How near to 0 and 1 a reference may come.
    """

    def __init__(
        self, config: DenoisingConfig, num_classes: int, width: int, eps: float = LOGIT_EPS
    ) -> None:
        super().__init__()
        self.config, self.num_classes, self.eps = config, num_classes, eps
        self.sides = 2 if config.contrastive else 1
        # Without contrast: one more label for "unknown", one channel less for the indicator.
        extra = 0 if config.contrastive else 1
        self.label_embedding = nn.Embedding(num_classes + extra, width - extra)

    def unknown(self) -> Tensor:
        """Content ``[D]`` of queries that are not for denoising (DN-DETR)."""
        return functional.pad(self.label_embedding.weight[self.num_classes], (0, 1))

    def contents(self) -> Tensor:
        """Content ``[K, D]`` of a denoising query of each class."""
        table = self.label_embedding.weight[: self.num_classes]
        return table if self.config.contrastive else functional.pad(table, (0, 1), value=1.0)

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
        number = self.config.number
        groups = max(1, number // most) if self.config.contrastive else number
        labels, boxes, padding = _stack(targets, most)

        def tiled(x: Tensor) -> Tensor:
            """``[B, G, ...]`` to ``[B, groups, 2 or 1, G, ...]``."""
            return x[:, None, None].expand(-1, groups, self.sides, *x.shape[1:])

        device = boxes.device
        drawn = self._drawn(targets, generators, groups, most).to(device)
        noisy_labels = self._noisy_labels(tiled(labels), drawn[..., :2])
        noise = self._noisy_corners if self.config.contrastive else self._noisy_sizes
        noisy_boxes = noise(tiled(boxes), drawn[..., 2:])
        filler = tiled(padding).flatten(1)
        content = self.label_embedding(noisy_labels.flatten(1))
        if not self.config.contrastive:
            content = functional.pad(content, (0, 1), value=1.0)
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
        """``[B, groups, 2 or 1, G, 10 or 6]`` uniform numbers in [0, 1) on the CPU.

        Of a query: whether its label changes, into which; then sizes and, where the denoising is
        contrastive, signs of its box's four shifts.
        """
        channels = 10 if self.config.contrastive else 6
        drawn = torch.zeros(len(targets), groups, self.sides, most, channels)
        sources: Sequence[torch.Generator | None] = generators or [None] * len(targets)
        for row, target, source in zip(drawn, targets, sources, strict=True):
            count = len(target.labels)
            shape = (groups, self.sides, count, channels)
            row[:, :, :count] = torch.rand(shape, generator=source)
        return drawn

    def _noisy_labels(self, labels: Tensor, drawn: Tensor) -> Tensor:
        """Replaces labels by uniformly drawn ones with the configured probability.

        Args:
            labels: ``[...]``.
            drawn: ``[..., 2]`` uniform numbers.
        """
        other = (drawn[..., 1] * self.num_classes).long().clamp(max=self.num_classes - 1)
        return torch.where(drawn[..., 0] < self.config.label_noise, other, labels)

    def _noisy_corners(self, boxes: Tensor, drawn: Tensor) -> Tensor:
        """Moves every corner by 0..1 (positives) or 1..2 (harder negatives) half sizes either way.

        Args:
            boxes: ``[B, groups, 2, G, 4]`` cx cy w h; positives first.
            drawn: ``[B, groups, 2, G, 8]`` uniform numbers.

        Returns:
            The boxes' shape and format, within the range a reference logit can hold.
        """
        half = boxes[..., 2:].repeat(1, 1, 1, 1, 2) / 2
        farther = float(self.config.harder_negatives)
        negative = torch.tensor([0.0, farther], device=boxes.device).view(2, 1, 1)
        sign = torch.where(drawn[..., 4:] < 0.5, -1.0, 1.0)
        size = drawn[..., :4] + negative
        corners = cxcywh_to_xyxy(boxes) + size * sign * half * self.config.box_noise
        # A negative's corners may cross: such a box keeps its centre and the smallest size.
        return xyxy_to_cxcywh(corners.clamp(0, 1)).clamp(self.eps, 1 - self.eps)

    def _noisy_sizes(self, boxes: Tensor, drawn: Tensor) -> Tensor:
        """Moves centres by up to half a size and scales sizes, each times the noise (DN-DETR 4.2).

        Arguments and result as :meth:`_noisy_corners`, with four uniform numbers a box.
        """
        reach = torch.cat((boxes[..., 2:] / 2, boxes[..., 2:]), -1) * self.config.box_noise
        return (boxes + (2 * drawn - 1) * reach).clamp(self.eps, 1 - self.eps)


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
