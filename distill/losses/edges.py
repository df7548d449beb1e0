"""What distributions of edges learn from the ground truth.

Peng et al. 2024, D-FINE, equation 5: fine-grained localization (FGL).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from detr.models import GroupOutput, Target
from detr.models.heads.distribution import edge_distances, edge_places, shared_places
from distill.losses.matches import Matches
from distill.losses.targets import JoinedTargets, pair_iou


def localization_loss(output: GroupOutput, targets: Sequence[Target], matches: Matches) -> Tensor:
    """Cross-entropies of matched boxes' edges with their true places, summed.

    A true place lies between two of the distribution's and is shared by these, the nearer one
    having more. A box weighs as much as its IoU, without gradient.

    Args:
        output: A group's answers, with distributions.
        targets: Ground truth per image.
        matches: The pairs of all its layers.

    Returns:
        Scalar, float32.
    """
    assert output.first is not None
    truth = JoinedTargets.of(targets)
    boxes = torch.stack(output.boxes)
    first = output.first.boxes[matches.image, matches.query].detach().float()
    edges = torch.stack(output.edges)[matches.layer, matches.image, matches.query].float()
    refinement = output.first.refinement
    places = edge_places(refinement).to(edges.device)
    true_boxes = truth.of_pairs(matches)[0].float()
    left, share = shared_places(edge_distances(first, true_boxes, refinement.curvature), places)
    log = F.log_softmax(edges, -1)

    def entropy(place: Tensor) -> Tensor:
        return -log.gather(-1, place[..., None])[..., 0]

    loss = (1 - share) * entropy(left) + share * entropy(left + 1)
    return (loss.sum(-1) * pair_iou(boxes, matches, truth)).sum()
