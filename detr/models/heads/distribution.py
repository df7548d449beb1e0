"""Boxes as distributions over the places of their edges.

Peng et al. 2024, D-FINE: Redefine Regression Task of DETRs as Fine-grained Distribution Refinement,
section 4.1; the places are equation 4's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detr.config import DistributionRefinementConfig, QualityConfig
from detr.models.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from detr.models.layers import MLP

# Left, top, right, bottom: how far each edge lies outside the first box.
EDGES = 4


def edge_places(config: DistributionRefinementConfig) -> Tensor:
    """``[R + 1]`` distances that an edge's distribution is over, ascending, float32.

    In parts of ``size / curvature`` of the first box. They are denser around zero, and the two
    outermost lie twice as far as their neighbors.
    """
    reach = config.reach * config.curvature
    step = (reach + 1) ** (2 / (config.bins - 2))
    right = [step**i - 1 for i in range(1, config.bins // 2)]
    places = [-2 * reach, *(-x for x in reversed(right)), 0.0, *right, 2 * reach]
    return torch.tensor(places, dtype=torch.float32)


def moved_edges(first: Tensor, distances: Tensor, curvature: float) -> Tensor:
    """Boxes ``[..., 4]`` cx cy w h whose edges lie outside a first box's.

    Args:
        first: ``[..., 4]`` cx cy w h.
        distances: ``[..., 4]`` of left, top, right and bottom edge, in parts of
            ``size / curvature``.
        curvature: Of the config.
    """
    corners = cxcywh_to_xyxy(first)
    low, high = (distances * _sizes(first) / curvature).chunk(2, -1)
    return xyxy_to_cxcywh(torch.cat((corners[..., :2] - low, corners[..., 2:] + high), -1))


def edge_distances(first: Tensor, boxes: Tensor, curvature: float) -> Tensor:
    """``[..., 4]`` distances with which :func:`moved_edges` makes boxes of first boxes.

    Args:
        first: ``[..., 4]`` cx cy w h.
        boxes: The same.
        curvature: Of the config.
    """
    start, end = cxcywh_to_xyxy(first), cxcywh_to_xyxy(boxes)
    outwards = torch.cat((start[..., :2] - end[..., :2], end[..., 2:] - start[..., 2:]), -1)
    return outwards * curvature / _sizes(first).clamp(min=1e-9)


def _sizes(boxes: Tensor) -> Tensor:
    """``[..., 4]`` the size of a box along the direction in which each edge moves."""
    return torch.cat((boxes[..., 2:], boxes[..., 2:]), -1)


def shared_places(distances: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """The place at or before each distance, and the share of the place after it.

    A distance beyond the outermost places belongs to these alone.

    Args:
        distances: Any shape.
        places: ``[R + 1]`` ascending.

    Returns:
        Indices in 0..R-1 and shares in [0, 1], in the distances' shape.
    """
    left = torch.searchsorted(places, distances.contiguous(), right=True) - 1
    left = left.clamp(0, len(places) - 2)
    before, after = places[left], places[left + 1]
    return left, ((distances - before) / (after - before)).clamp(0, 1)


class Quality(nn.Module):
    """What a box's distributions add to its class logits (D-FINE's location quality estimator).

    Args:
        config: What it looks at.
    """

    def __init__(self, config: QualityConfig) -> None:
        super().__init__()
        self.top = config.top
        self.score = MLP(EDGES * (config.top + 1), config.width, 1)
        last = self.score.layers[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, probabilities: Tensor) -> Tensor:
        """``[B, N, 4, R + 1]`` to ``[B, N, 1]``."""
        best = probabilities.topk(self.top, -1).values
        seen = torch.cat((best, best.mean(-1, keepdim=True)), -1)
        out: Tensor = self.score(seen.flatten(-2))
        return out
