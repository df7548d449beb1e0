"""What flows between a detector's three steps: memory, query groups and their outputs.

Shape legend: B batch, S tokens of all levels, D width, N queries, K classes, V levels, L decoder
layers, M heads, P points of a level, K of all together, R reference size (2: center, 4: cx cy w h),
C channels of a pixel.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from detr.config import DistributionRefinementConfig
from detr.points import Points

LevelShapes = tuple[tuple[int, int], ...]


@dataclass
class Levels:
    """The maps of a batch on their way from the neck to an encoder.

    Attributes:
        maps: ``[B, E, H_v, W_v]`` each, finest first; E is D but where the encoder has another
            width.
        padding: ``[B, S]`` bool, true where a cell lies outside the image; levels in order.
        valid_ratios: ``[B, V, 2]`` (width, height) share of each level covered by the image.
    """

    maps: list[Tensor]
    padding: Tensor
    valid_ratios: Tensor

    @property
    def shapes(self) -> LevelShapes:
        """(height, width) of each level."""
        return tuple((int(x.shape[-2]), int(x.shape[-1])) for x in self.maps)

    def tokens(self) -> Tensor:
        """The cells of all levels in one row, ``[B, S, D]``."""
        return torch.cat([x.flatten(2).transpose(1, 2) for x in self.maps], 1)


@dataclass
class PixelMap:
    """What the pixels of a batch say of themselves: a query's mask is its product with them.

    Attributes:
        embedding: ``[B, C, H_4, W_4]``, of cells of 4 x 4 pixels of the canvas.
        valid: ``[B, 2]`` (width, height) of the image inside the canvas, in cells, not rounded.
    """

    embedding: Tensor
    valid: Tensor

    def masks(self, queries: Tensor) -> Tensor:
        """Mask logits ``[B, N, H_4, W_4]`` of queries ``[B, N, C]`` on the canvas."""
        return torch.einsum("bnc,bchw->bnhw", queries, self.embedding)

    @property
    def extent(self) -> Tensor:
        """``[B, 2]`` (width, height) share of the map that the image covers."""
        height, width = self.embedding.shape[-2:]
        return torch.stack((self.valid[:, 0] / width, self.valid[:, 1] / height), -1)


@dataclass
class Memory:
    """The encoder's view of a batch.

    Attributes:
        tokens: ``[B, S, D]`` encoder output (the projected maps when there are no encoder layers).
        shapes: (height, width) of each level, finest first; S is the sum of their products.
        padding: ``[B, S]`` bool, true where a token lies outside the image.
        valid_ratios: ``[B, V, 2]`` (width, height) share of each level covered by the image.
        positions: ``[B, S, D]`` sine position plus level embedding.
        features: Backbone maps, finest first, ``[B, C_v, H_v, W_v]``.
        layers: The encoder's input followed by each layer's output, ``[B, S, E]`` each.
        answer: What the detector says to its own queries, where it says so while it looks; ours
            wait for the decoder.
        pixels: What masks are made of, in a detector that has them.
    """

    tokens: Tensor
    shapes: LevelShapes
    padding: Tensor
    valid_ratios: Tensor
    positions: Tensor
    features: list[Tensor] = field(default_factory=list)
    layers: list[Tensor] = field(default_factory=list)
    answer: GroupOutput | None = None
    pixels: PixelMap | None = None

    def levels(self) -> Levels:
        """The tokens as maps."""
        sizes = [height * width for height, width in self.shapes]
        maps = [
            torch.unflatten(x.transpose(1, 2), 2, shape)
            for x, shape in zip(torch.split(self.tokens, sizes, 1), self.shapes, strict=True)
        ]
        return Levels(maps, self.padding, self.valid_ratios)


@dataclass
class Target:
    """Ground truth of one image.

    Attributes:
        boxes: ``[G, 4]`` cx cy w h, relative to the image without its padding.
        labels: ``[G]`` int64 class indices.
        ignore: ``[I, 4]`` regions (same format) in which a detection is neither right nor wrong.
        masks: ``[G, H, W]`` bool at the size of the network's input, false in its padding; None
            where only boxes are learned.
    """

    boxes: Tensor
    labels: Tensor
    ignore: Tensor
    masks: Tensor | None = None

    def to(self, device: torch.device | str) -> Target:
        """The same on another device, which is not waited for."""
        moved: dict[str, Any] = {
            f.name: None
            if (value := getattr(self, f.name)) is None
            else value.to(device, non_blocking=True)
            for f in fields(self)
        }
        return Target(**moved)


@dataclass
class Proposals:
    """The encoder proposals chosen as anchors (two-stage and mixed query selection).

    Attributes:
        logits: ``[B, N, K]`` class logits of the chosen tokens.
        boxes: ``[B, N, 4]`` cx cy w h in [0, 1].
        indices: ``[B, N]`` token index of each proposal.
        tokens: ``[B, N, D]`` what its class and box were read from.
        class_agnostic: The first class channel means "any object", so the loss on these logits
            sets every label to 0 (Deformable DETR two-stage); otherwise they are ordinary classes.
        masks: ``[B, N, C]`` what each says of its mask, where proposals have masks.
    """

    logits: Tensor
    boxes: Tensor
    indices: Tensor
    tokens: Tensor
    class_agnostic: bool = False
    masks: Tensor | None = None


@dataclass
class Denoising:
    """What the loss needs to know of a denoising group: which query stands for which box.

    Attributes:
        groups: Number of denoising groups in the group; each is positives then, where the
            denoising is contrastive, as many negatives.
        size: Queries of one denoising group (1 or 2 x the batch's largest box count).
    """

    groups: int
    size: int


@dataclass
class QueryGroup:
    """Queries that look at each other and at no other group.

    Attributes:
        role: ``own``, ``denoising``, ``general``, ``specific``, ``target_aware``, ...; unique in a
            call.
        content: ``[B, N, D]``.
        reference: ``[B, N, R]`` in [0, 1], relative to the image without its padding.
        position: ``[B, N, D]`` positional half of learned queries; ``None`` where the decoder makes
            it from the reference.
        padding: ``[B, N]`` bool, true for filler queries (never attended to, never in a loss).
        blocks: The group is this many equal blocks that cannot see each other.
        sees: Role of one further group this one may attend to (denoising queries see ``own``).
        proposals: The encoder proposals this group was made from.
        denoising: Set on the denoising group.
        repeat: How many of its queries each ground-truth box is assigned to (one-to-many).
    """

    role: str
    content: Tensor
    reference: Tensor
    position: Tensor | None = None
    padding: Tensor | None = None
    blocks: int = 1
    sees: str | None = None
    proposals: Proposals | None = None
    denoising: Denoising | None = None
    repeat: int = 1


@dataclass
class SampledAttention:
    """Cross-attention of one decoder layer, as sampled.

    Attributes:
        locations: ``[B, N, M, V, P, 2]`` (x, y) in [0, 1] of the padded canvas; ``[B, N, M, K, 2]``
            where the levels' numbers of points differ.
        weights: ``[B, N, M, V, P]``, softmax over V x P; or ``[B, N, M, K]``.
        points: Sampling points P per level, or of each level.
    """

    locations: Tensor
    weights: Tensor
    points: Points

    def in_a_row(self) -> tuple[Tensor, Tensor]:
        """Locations ``[B, N, M, K, 2]`` and weights ``[B, N, M, K]``, level after level."""
        return self.locations.flatten(3, -2), self.weights.flatten(3)


@dataclass
class DenseAttention:
    """Cross-attention of one decoder layer over all tokens.

    Attributes:
        weights: ``[B, M, N, S]``, softmax over the tokens inside the image.
    """

    weights: Tensor


Attention = SampledAttention | DenseAttention


@dataclass
class InitialAnswer:
    """What the decoder's heads say of a group before its first layer (Mask DINO, section 3.2).

    Attributes:
        logits: ``[B, N, K]``.
        boxes: ``[B, N, 4]``, the group's references.
        masks: ``[B, N, C]`` what each query says of its mask, in a detector that has masks.
    """

    logits: Tensor
    boxes: Tensor
    masks: Tensor | None


@dataclass
class FirstBoxes:
    """The boxes whose edges a decoder's distributions move, which are a prediction themselves.

    Attributes:
        logits: ``[B, N, K]``.
        boxes: ``[B, N, 4]`` cx cy w h in [0, 1].
        refinement: What the distributions are over.
    """

    logits: Tensor
    boxes: Tensor
    refinement: DistributionRefinementConfig


@dataclass
class GroupOutput:
    """What the decoder made of one group; every list has one entry per decoder layer.

    Attributes:
        group: The group that went in.
        logits: ``[B, N, K]`` per layer; ``[B, N, K + 1]`` with ``no_object``.
        boxes: ``[B, N, 4]`` per layer, cx cy w h in [0, 1].
        hidden: ``[B, N, D]`` per layer, the tensor that enters the next layer.
        references: ``[B, N, R]`` per layer, the reference the layer started from.
        attention: Per layer, only where ``decode(..., attention=True)`` asked for it.
        self_attention: ``[B, M, N, N_keys]`` per layer, softmax before dropout; keys are the
            group's own queries, then those of the group it sees. Only where ``decode(...,
            self_attention=...)`` named the group's role.
        no_object: The last logit says "no object", so logits go through a softmax (DETR).
        first: What the first layer said before any distribution; only with distributions.
        edges: ``[B, N, 4, R + 1]`` logits per layer of where left, top, right and bottom edge lie,
            seen from the first box; only with distributions.
        masks: ``[B, N, C]`` per layer, what each query says of its mask: its product with
            ``pixels``. Empty in a detector without masks.
        pixels: Of the memory, where there are masks.
        initial: In training, where the detector's queries are judged before the first layer, too.
    """

    group: QueryGroup
    logits: list[Tensor]
    boxes: list[Tensor]
    hidden: list[Tensor]
    references: list[Tensor]
    attention: list[Attention] = field(default_factory=list)
    self_attention: list[Tensor] = field(default_factory=list)
    no_object: bool = False
    first: FirstBoxes | None = None
    edges: list[Tensor] = field(default_factory=list)
    masks: list[Tensor] = field(default_factory=list)
    pixels: PixelMap | None = None
    initial: InitialAnswer | None = None

    def mask_logits(self, layer: int = -1) -> Tensor:
        """``[B, N, H_4, W_4]`` of a layer, on the canvas; for detectors with masks."""
        assert self.pixels is not None
        return self.pixels.masks(self.masks[layer])
