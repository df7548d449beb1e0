"""RT-DETR's encoder: attention within the coarsest map, convolutions across scales.

Zhao et al., DETRs Beat YOLOs on Real-time Object Detection (CVPR 2024), section 4.2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detr.config import DetectorConfig
from detr.config.encoder import AnyGelanEncoderConfig, AnyHybridEncoderConfig
from detr.models.attention.deformable import token_span
from detr.models.convolutions import (
    ConvNorm,
    CSPBlock,
    GelanBlock,
    fitted,
    pooled_downsample,
    separable_downsample,
)
from detr.models.encoders.base import Encoder
from detr.models.encoders.tokens import DenseEncoderLayer
from detr.models.queries.position import token_positions
from detr.models.structures import Levels, Memory


class HybridEncoder(Encoder):
    """Attention within the coarsest map (AIFI), then a top-down and a bottom-up path (CCFF).

    Cells in the padding take no part in the attention.

    Args:
        config: The detector.
        encoder: Its encoder.
    """

    def __init__(self, config: DetectorConfig, encoder: AnyHybridEncoderConfig) -> None:
        super().__init__()
        self.positions, self.outer = config.positions, config.width
        width, steps = config.map_width, config.neck.levels - 1
        self.width = width
        own = config.model_copy(update={"width": width})
        self.layers = nn.ModuleList(DenseEncoderLayer(own, encoder) for _ in range(encoder.layers))
        # From coarse to fine, then from fine to coarse.
        self.lateral = nn.ModuleList(self._lateral(width) for _ in range(steps))
        self.top_down = nn.ModuleList(self._fusion(width, encoder) for _ in range(steps))
        self.downsample = nn.ModuleList(self._downsample(width) for _ in range(steps))
        self.bottom_up = nn.ModuleList(self._fusion(width, encoder) for _ in range(steps))
        self.projections = nn.ModuleList(
            self._projection(width, config.width) for _ in range(steps + 1)
        )
        # Only training reads what lies between the layers.
        self.keeps_layers = True

    @staticmethod
    def _lateral(width: int) -> nn.Module:
        """What a coarser map goes through before it is enlarged."""
        return ConvNorm(width, width, 1)

    @staticmethod
    def _fusion(width: int, encoder: AnyHybridEncoderConfig) -> nn.Module:
        """What makes one map, ``[B, width, H, W]``, of two."""
        inner = round(width * encoder.expansion)
        return CSPBlock(2 * width, inner, width, encoder.blocks, of_two=True)

    @staticmethod
    def _downsample(width: int) -> nn.Module:
        """What brings a finer map to the size of the next."""
        return ConvNorm(width, width, 3, stride=2)

    @staticmethod
    def _projection(width: int, outer: int) -> nn.Module:
        """What brings a map to the detector's width."""
        return ConvNorm(width, outer, 1, activate=False)

    def encode(self, levels: Levels) -> Memory:
        """See the base class."""
        # Called as a module, so that costs and a graph's names are the encoder's.
        memory: Memory = self(levels)
        return memory

    def forward(self, levels: Levels) -> Memory:
        """See :meth:`encode`."""
        shapes, ratios, padding = levels.shapes, levels.valid_ratios, levels.padding
        layers = self._attend(levels)
        coarsest = torch.unflatten(layers[-1].transpose(1, 2), 2, shapes[-1])
        fused = self._fuse(Levels([*levels.maps[:-1], coarsest], padding, ratios))
        maps = [project(x) for project, x in zip(self.projections, fused, strict=True)]
        tokens = Levels(maps, padding, ratios).tokens()
        positions = torch.cat(token_positions(self.positions, ratios, shapes, self.outer), 1)
        kept = []
        if self.keeps_layers:
            finer = levels.tokens()[:, : -layers[0].shape[1]]
            kept = [torch.cat((finer, x), 1) for x in layers]
        # Not len(tokens), which is a constant of a traced graph.
        positions = positions.expand(tokens.shape[0], -1, -1)
        return Memory(tokens, shapes, padding, ratios, positions, layers=kept)

    def _attend(self, levels: Levels) -> list[Tensor]:
        """Tokens ``[B, H * W, E]`` of the coarsest map, before and after each layer."""
        shapes = levels.shapes[-1:]
        outputs = [levels.maps[-1].flatten(2).transpose(1, 2)]
        padding = levels.padding[:, -outputs[0].shape[1] :]
        ratios = levels.valid_ratios[:, -1:]
        (positions,) = token_positions(self.positions, ratios, shapes, self.width)
        span = token_span(padding)
        for layer in self.layers:
            outputs.append(layer(outputs[-1], positions, span, padding, shapes))
        return outputs

    def _fuse(self, levels: Levels) -> list[Tensor]:
        """Maps ``[B, E, H_v, W_v]`` that have seen each other, finest first."""
        maps = levels.maps
        inner = [maps[-1]]
        steps = zip(self.lateral, self.top_down, reversed(maps[:-1]), strict=True)
        for step, (lateral, fuse, finer) in enumerate(steps):
            inner[0] = lateral(self._informed(inner[0], levels, len(maps) - 1 - step))
            inner.insert(0, fuse(inner[0], finer))
        outer = inner[:1]
        for downsample, fuse, coarser in zip(
            self.downsample, self.bottom_up, inner[1:], strict=True
        ):
            outer.append(fuse(fitted(downsample(outer[-1]), coarser), coarser))
        return outer

    def _informed(self, x: Tensor, levels: Levels, index: int) -> Tensor:
        """A map of level ``index`` as its lateral convolution sees it."""
        return x


class GelanEncoder(HybridEncoder):
    """D-FINE's: GELAN blocks, and nothing where nothing need be done (Peng et al. 2024, section 4).

    GELAN's ways have half the channels that an expansion of 1 gives a CSP block. DEIMv2 adds maps
    where D-FINE lays them beside each other.
    """

    @staticmethod
    def _lateral(width: int) -> nn.Module:
        """See the base class."""
        return ConvNorm(width, width, 1, activate=False)

    @staticmethod
    def _fusion(width: int, encoder: AnyHybridEncoderConfig) -> nn.Module:
        """See the base class."""
        assert isinstance(encoder, AnyGelanEncoderConfig)
        inner = int(width * encoder.expansion / 2)
        return GelanBlock(width, inner, encoder.blocks, encoder.join == "sum", encoder.smooth)

    @staticmethod
    def _downsample(width: int) -> nn.Module:
        """See the base class."""
        return separable_downsample(width)

    @staticmethod
    def _projection(width: int, outer: int) -> nn.Module:
        """See the base class."""
        if width == outer:
            return nn.Identity()
        return ConvNorm(width, outer, 1, activate=False)


class LiteEncoder(GelanEncoder):
    """DEIMv2's smallest: means in place of attention and strided convolutions (Huang et al. 2025).

    A coarser map learns its mean over the image before it is enlarged; the released code's mean is
    over the canvas, which is the same where an image fills it.
    """

    @staticmethod
    def _lateral(width: int) -> nn.Module:
        """See the base class."""
        return ConvNorm(width, width, 1)

    @staticmethod
    def _downsample(width: int) -> nn.Module:
        """See the base class."""
        return pooled_downsample(width)

    def _informed(self, x: Tensor, levels: Levels, index: int) -> Tensor:
        """See the base class."""
        sizes = [height * width for height, width in levels.shapes]
        inside = ~torch.split(levels.padding, sizes, 1)[index]
        shares = (inside / inside.sum(1, keepdim=True)).to(x.dtype)
        mean = torch.einsum("bcs,bs->bc", x.flatten(2), shares)
        return x + mean[..., None, None]
