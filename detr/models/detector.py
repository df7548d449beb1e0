"""The detector: encode an image, make queries, decode them; ``forward`` is what gets exported."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from detr.config import ClassesConfig, DetectorConfig, PartName
from detr.models.backbones.build import build_backbone, build_neck
from detr.models.boxes import cxcywh_to_xyxy
from detr.models.decoder import Decoder
from detr.models.encoders.base import Encoder
from detr.models.encoders.build import build_encoder
from detr.models.geometry import padding_mask, valid_ratios
from detr.models.heads.classes import best
from detr.models.heads.masks import build_pixels, chosen_masks, mask_quality
from detr.models.layers import MLP
from detr.models.parts import modules_of, part_of
from detr.models.protocol import EVERYTHING, WITHOUT_MASKS, Facts
from detr.models.queries.build import build_queries
from detr.models.queries.denoising import PlainDenoiser, build_denoiser
from detr.models.queries.sources import LearnedQueries
from detr.models.structures import GroupOutput, Levels, Memory, QueryGroup, Target


class Detector(nn.Module):
    """A detection transformer.

    Args:
        config: The architecture.
        pretrained: Load the backbone weights the config names.

    Attributes:
        config: The architecture.
        strides: Pixels per cell of each level.
        facts: What methods pair it with another detector by.
        offers: As a teacher, it shows everything it has.
    """

    def __init__(self, config: DetectorConfig, pretrained: bool = True) -> None:
        super().__init__()
        self.config = config
        self.strides = config.strides
        self.backbone = build_backbone(config.backbone, pretrained, config.mask_strides)
        channels = self.backbone.channels[len(config.mask_strides) :]
        self.facts = _facts(config, channels)
        self.offers = EVERYTHING if self.facts.masks else WITHOUT_MASKS
        self.neck = build_neck(config.neck, channels, config.map_width)
        self.encoder = build_encoder(config)
        self.source = build_queries(config)
        self.decoder = Decoder(config)
        self.source.judge_by(self.decoder.heads)
        self.denoiser = build_denoiser(config)
        self.pixels = build_pixels(config, self.backbone.channels[0])
        if config.mlp_activation == "silu":
            # Told afterwards: each part makes its own, and all of them have the same.
            for mlp in (module for module in self.modules() if isinstance(module, MLP)):
                mlp.activation = functional.silu
        self._frozen: set[PartName] = set()

    def freeze(self, part: PartName) -> bool:
        """Keeps a part as it is: no gradients, no statistics, no dropout, also in training.

        Returns:
            Whether there is such a part.
        """
        named = [p for name, p in self.named_parameters() if part_of(name) == part]
        for parameter in named:
            parameter.requires_grad_(False)
        self._frozen.add(part)
        self.train(self.training)
        return bool(named)

    def keep_frozen(self, other: Detector) -> Detector:
        """Takes over what is frozen of another detector, and its mode."""
        self._frozen = set(other._frozen)
        return self.train(other.training)

    def train(self, mode: bool = True) -> Detector:
        """Switches to training, but for frozen parts, or back to evaluation."""
        super().train(mode)
        for module in modules_of(self, self._frozen):
            module.training = False
        return self

    def encode(self, images: Tensor, valid_sizes: Tensor) -> Memory:
        """Backbone, neck and encoder.

        Args:
            images: ``[B, 3, H, W]``, normalized, padded at the right and bottom.
            valid_sizes: ``[B, 2]`` (height, width) of the image inside the canvas, pixels.
        """
        every_map = self.backbone(images, valid_sizes)
        features = every_map[len(self.config.mask_strides) :]
        maps = self.neck(features)
        shapes = tuple((int(x.shape[-2]), int(x.shape[-1])) for x in maps)
        ratios = valid_ratios(valid_sizes, shapes, (images.shape[-2], images.shape[-1]))
        memory = self.encoder.encode(Levels(maps, padding_mask(ratios, shapes), ratios))
        memory.features = features
        if self.pixels is not None:
            memory.pixels = self.pixels(every_map[0], memory, valid_sizes)
        return memory

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
        denoiser = self.denoiser
        if isinstance(denoiser, PlainDenoiser) and self.config.queries.zero_content:
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
        encoder = self.config.encoder
        own = encoder.replace(**encoder.alone(layers))
        # No part of a detector, so it need not fit a decoder.
        return build_encoder(self.config.model_copy(update={"encoder": own}))

    def forward(
        self, images: Tensor, valid_sizes: Tensor, original_sizes: Tensor
    ) -> tuple[Tensor, ...]:
        """Detections, best first; this is the graph that is exported.

        Args:
            images: ``[B, 3, H, W]``, see :meth:`encode`.
            valid_sizes: ``[B, 2]`` (height, width) inside the canvas.
            original_sizes: ``[B, 2]`` (height, width) of the image as read.

        Returns:
            Boxes ``[B, T, 4]`` x0 y0 x1 y1 in pixels of the original image and within it, scores
            ``[B, T]`` and labels ``[B, T]`` int64; T is ``config.detections``, or the number of
            candidates if fewer. In a detector with masks also their logits ``[B, T, H_4, W_4]``
            in cells of 4 x 4 pixels of the canvas; a pixel is part of an object above 0.
        """
        memory = self.encode(images, valid_sizes)
        output = self.decoder(memory, [self._own(memory)], self.source, final_only=True)[0]
        classes, limit = self.config.heads.classes, self.config.detections
        masks = self.config.heads.masks
        if masks is None:
            return detections(output.logits[-1], output.boxes[-1], original_sizes, classes, limit)
        scores, queries, labels = best(classes, output.logits[-1], limit)
        chosen = output.boxes[-1].gather(1, queries[..., None].expand(-1, -1, 4))
        pixels = in_pixels(chosen, original_sizes)
        told = chosen_masks(output, queries)
        if masks.weigh_scores:
            assert output.pixels is not None
            scores = scores * mask_quality(told, output.pixels)
            scores, order = scores.sort(1, descending=True)
            labels = labels.gather(1, order)
            pixels = pixels.gather(1, order[..., None].expand_as(pixels))
            told = told.gather(1, order[..., None, None].expand_as(told))
        return pixels, scores, labels, told


def _facts(config: DetectorConfig, backbone_channels: tuple[int, ...]) -> Facts:
    """What a config says about the detector made of it."""
    queries = config.queries
    # Methods pair maps of backbones by the levels that are made of them.
    paired = config.neck.of_maps
    return Facts(
        family="DETR",
        num_classes=config.num_classes,
        width=config.width,
        neck_width=config.map_width,
        heads=config.attention_heads,
        cross_heads=config.sampling_heads,
        attention=config.decoder.cross_attention.kind,
        strides=config.strides,
        backbone_strides=config.backbone.strides if paired else (),
        backbone_channels=backbone_channels if paired else (),
        encoder_layers=config.encoder.layers,
        decoder_layers=config.decoder.layers,
        num_queries=queries.total,
        query_start="points" if queries.learned_positions else "boxes",
        blank_content=queries.zero_content,
        scores=config.heads.classes.kind,
        edges=config.decoder.refinement.distribution is not None,
        masks=config.heads.masks is not None,
    )


def detections(
    logits: Tensor,
    boxes: Tensor,
    original_sizes: Tensor,
    classes: ClassesConfig,
    limit: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The best candidates as boxes in pixels.

    What a candidate is, the class head says: see :mod:`detr.models.heads.classes`.

    Args:
        logits: ``[B, N, K]``, or ``[B, N, K + 1]`` with "no object" last.
        boxes: ``[B, N, 4]`` cx cy w h relative to the image.
        original_sizes: ``[B, 2]`` (height, width), pixels.
        classes: Says how candidates are ranked.
        limit: Number of detections kept.

    Returns:
        As :meth:`Detector.forward`.
    """
    scores, queries, labels = best(classes, logits, limit)
    chosen = boxes.gather(1, queries[..., None].expand(-1, -1, 4))
    return in_pixels(chosen, original_sizes), scores, labels


def in_pixels(boxes: Tensor, original_sizes: Tensor) -> Tensor:
    """Relative boxes ``[B, N, 4]`` as corners in pixels of the original image, within it."""
    scale = original_sizes.flip(-1).repeat(1, 2)[:, None]
    return torch.minimum((cxcywh_to_xyxy(boxes) * scale).clamp(min=0), scale)


def build_detector(config: DetectorConfig, pretrained: bool = True) -> Detector:
    """Builds a detector; see :class:`Detector`.

    Raises:
        UserError: What :class:`detr.models.backbones.timm.Backbone` raises.
    """
    return Detector(config, pretrained)
