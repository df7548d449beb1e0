"""The detector: encode an image, make queries, decode them; ``forward`` is what gets exported."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from detr.config import DetectorConfig
from detr.models.backbones.neck import Neck
from detr.models.backbones.timm import Backbone
from detr.models.boxes import cxcywh_to_xyxy
from detr.models.decoder import Decoder
from detr.models.encoders.tokens import Encoder
from detr.models.geometry import padding_mask, valid_ratios
from detr.models.protocol import EVERYTHING, Facts
from detr.models.queries.denoising import Denoiser
from detr.models.queries.sources import LearnedQueries, query_source
from detr.models.structures import GroupOutput, Memory, QueryGroup, Target


class Detector(nn.Module):
    """A detection transformer.

    Args:
        config: The architecture.
        pretrained: Load the backbone weights the config names.

    Attributes:
        config: The architecture.
        strides: Pixels per cell of each level.
        facts: What methods pair it with another detector by.
        offers: As a teacher, it shows everything.
    """

    offers = EVERYTHING

    def __init__(self, config: DetectorConfig, pretrained: bool = True) -> None:
        super().__init__()
        self.config = config
        strides = list(config.backbone.strides)
        while len(strides) < config.levels:
            strides.append(strides[-1] * 2)
        self.strides = tuple(strides)
        self.backbone = Backbone(config.backbone, pretrained)
        self.facts = _facts(config, self.strides, self.backbone.channels)
        deformable = config.attention == "deformable"
        self.neck = Neck(self.backbone.channels, config.levels, config.width, deformable)
        self.encoder = Encoder(config)
        self.source = query_source(config)
        self.decoder = Decoder(config)
        self.denoiser: Denoiser | None = None
        if config.denoising is not None:
            self.denoiser = Denoiser(
                config.denoising, config.num_classes, config.width, config.logit_eps
            )

    def encode(self, images: Tensor, valid_sizes: Tensor) -> Memory:
        """Backbone, neck and encoder.

        Args:
            images: ``[B, 3, H, W]``, normalised, padded at the right and bottom.
            valid_sizes: ``[B, 2]`` (height, width) of the image inside the canvas, pixels.
        """
        features = self.backbone(images)
        levels = self.neck(features)
        shapes = tuple((int(x.shape[-2]), int(x.shape[-1])) for x in levels)
        ratios = valid_ratios(valid_sizes, shapes, (images.shape[-2], images.shape[-1]))
        padding = padding_mask(ratios, shapes)
        tokens = torch.cat([x.flatten(2).transpose(1, 2) for x in levels], 1)
        positions = self.encoder.positions(ratios, shapes)
        memory, layers = self.encoder(tokens, positions, padding, ratios, shapes)
        return Memory(memory, shapes, padding, ratios, positions, features, layers)

    def queries(
        self,
        memory: Memory,
        targets: list[Target] | None = None,
        generators: Sequence[torch.Generator] | None = None,
        most: int = 0,
    ) -> list[QueryGroup]:
        """The detector's own queries and, in training with targets, the denoising ones.

        Args:
            memory: The batch.
            targets: Ground truth per image; needed for denoising only.
            generators: Source of each image's denoising noise, see :class:`Denoiser`.
            most: Largest box count among all processes' images, see :class:`Denoiser`.

        Returns:
            First the group ``own``, then, where they apply, ``one_to_many`` and ``denoising``.
        """
        if targets is None or not self.training:
            return [self._own(memory)]
        groups = self.source.training_groups(memory)
        groups[0] = self._told(groups[0])
        if self.denoiser is None:
            return groups
        denoising = self.denoiser(targets, generators, most)
        if denoising is None:
            # Nothing to denoise, but every parameter must take part in every distributed step.
            own = groups[0]
            own.content = own.content + 0.0 * self.denoiser.label_embedding.weight.sum()
            return groups
        return [*groups, denoising]

    def _own(self, memory: Memory) -> QueryGroup:
        """The group ``own``."""
        return self._told(self.source(memory))

    def _told(self, own: QueryGroup) -> QueryGroup:
        """The group, with the content of an unknown label if it has none of its own (DN-DETR)."""
        denoiser, dense = self.denoiser, self.config.attention != "deformable"
        if denoiser is not None and dense and not denoiser.config.contrastive:
            own.content = denoiser.unknown().expand_as(own.content)
        return own

    def decode(
        self,
        memory: Memory,
        groups: list[QueryGroup],
        attention: bool = False,
        self_attention: Collection[str] = (),
    ) -> list[GroupOutput]:
        """All groups through the decoder at once; they do not influence each other.

        Args:
            memory: The batch, this detector's or any of the same level layout and width.
            groups: Distinct roles.
            attention: Also return the cross-attention of every layer.
            self_attention: Roles of groups whose self-attention maps are also wanted.

        Returns:
            One output per group, in order.
        """
        outputs: list[GroupOutput] = self.decoder(
            memory, groups, self.source, attention, self_attention=self_attention
        )
        return outputs

    def class_contents(self) -> Tensor | None:
        """Content ``[K, D]`` of a denoising query of each class; ``None`` without denoising."""
        return None if self.denoiser is None else self.denoiser.contents()

    def reference_of(self, position: Tensor) -> Tensor:
        """Points ``[B, N, 2]`` at which queries of a position ``[B, N, D]`` start.

        For detectors whose queries start from points (``facts.query_start``).
        """
        assert isinstance(self.source, LearnedQueries)
        return self.source.reference(position)

    def encoder_like(self, layers: int) -> Encoder:
        """An encoder of that many new layers, otherwise shaped like this one."""
        plain = {"encoder_layers": layers, "memory_fusion": None}
        return Encoder(self.config.model_copy(update=plain))

    def forward(
        self, images: Tensor, valid_sizes: Tensor, original_sizes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Detections, best first; this is the graph that is exported.

        Args:
            images: ``[B, 3, H, W]``, see :meth:`encode`.
            valid_sizes: ``[B, 2]`` (height, width) inside the canvas.
            original_sizes: ``[B, 2]`` (height, width) of the image as read.

        Returns:
            Boxes ``[B, T, 4]`` x0 y0 x1 y1 in pixels of the original image and within it, scores
            ``[B, T]`` and labels ``[B, T]`` int64; T is ``config.detections``, or the number of
            candidates if fewer.
        """
        memory = self.encode(images, valid_sizes)
        output = self.decoder(memory, [self._own(memory)], self.source, final_only=True)[0]
        return detections(
            output.logits[-1],
            output.boxes[-1],
            original_sizes,
            self.config.detections,
            self.config.classification == "softmax",
        )


def _facts(
    config: DetectorConfig, strides: tuple[int, ...], backbone_channels: tuple[int, ...]
) -> Facts:
    """What a config says about the detector made of it."""
    learned, deformable = config.query == "learned", config.attention == "deformable"
    return Facts(
        family="DETR",
        num_classes=config.num_classes,
        width=config.width,
        heads=config.heads,
        attention=config.attention,
        strides=strides,
        backbone_strides=config.backbone.strides,
        backbone_channels=backbone_channels,
        encoder_layers=config.encoder_layers,
        decoder_layers=config.decoder_layers,
        num_queries=config.queries * max(1, config.patterns),
        query_start="points" if learned else "boxes",
        blank_content=not deformable
        and config.query in ("learned", "anchors")
        and not config.patterns,
        scores=config.classification,
    )


def detections(
    logits: Tensor,
    boxes: Tensor,
    original_sizes: Tensor,
    limit: int,
    softmax: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The best candidates as boxes in pixels.

    With sigmoid scores every (query, class) pair is a candidate; a softmax makes classes exclude
    each other, so there each query is one, with its best class (DETR).

    Args:
        logits: ``[B, N, K]``, or ``[B, N, K + 1]`` with "no object" last.
        boxes: ``[B, N, 4]`` cx cy w h relative to the image.
        original_sizes: ``[B, 2]`` (height, width), pixels.
        limit: Number of detections kept.
        softmax: The logits are those of a softmax.

    Returns:
        As :meth:`Detector.forward`.
    """
    if softmax:
        scores, labels = logits.softmax(-1)[..., :-1].max(-1)
        best, query = scores.topk(min(limit, scores.shape[1]), dim=1)
        labels = labels.gather(1, query)
    else:
        # Ranking logits equals ranking scores, but large logits do not tie as saturated scores do.
        classes = logits.shape[2]
        count = min(limit, logits.shape[1] * classes)
        best, index = logits.flatten(1).topk(count, dim=1)
        query = torch.div(index, classes, rounding_mode="floor")
        labels = index - query * classes
        best = best.sigmoid()
    chosen = boxes.gather(1, query[..., None].expand(-1, -1, 4))
    scale = original_sizes.flip(-1).repeat(1, 2)[:, None]
    pixels = torch.minimum((cxcywh_to_xyxy(chosen) * scale).clamp(min=0), scale)
    return pixels, best, labels


def build_detector(config: DetectorConfig, pretrained: bool = True) -> Detector:
    """Builds a detector; see :class:`Detector`.

    Raises:
        UserError: What :class:`detr.models.backbones.timm.Backbone` raises.
    """
    return Detector(config, pretrained)
