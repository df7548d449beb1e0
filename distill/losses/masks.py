"""Masks on sampled points: what they cost in matching, and their losses (Mask2Former, section 3.3).

A mask is the product of a query and the map of pixels, and both sampling and the product are
linear. So matching multiplies queries with pixels sampled at a few points, and no mask is ever
computed but those of matched queries.

Points are drawn within the image, not within its padding as in Mask DINO's code, whose images
nearly fill their canvas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from detr.config import MASK_STRIDE
from detr.models import GroupOutput, PixelMap, Proposals, Target
from distill.losses.matches import Matches

# Mask2Former: so many times as many points are drawn as are used, and so large a share of them are
# the most uncertain of these; the others are anywhere.
OVERSAMPLING, IMPORTANT = 3, 0.75
# Pairs whose masks are computed at a time, which bounds memory.
CHUNK = 128


@dataclass(frozen=True)
class Points:
    """How points are drawn.

    Attributes:
        number: Points of a mask.
        generators: On the CPU, one per image; ``None`` draws from the default generator.
    """

    number: int
    generators: Sequence[torch.Generator] | None = None

    def draw(self, image: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Uniform numbers in [0, 1) of an image, on a device."""
        if self.generators is None:
            return torch.rand(shape, device=device)
        source = self.generators[image]
        if device.type != "cpu":
            # Drawn where they are needed; a seed is cheaper to send than millions of numbers.
            seed = int(torch.randint(2**62, (), generator=source))
            source = torch.Generator(device).manual_seed(seed)
        return torch.rand(shape, generator=source, device=device)


@dataclass(frozen=True)
class MaskPredictions:
    """Masks of queries ``[L, B, N]``, as factors.

    Attributes:
        queries: ``[L, B, N, C]``.
        pixels: Of the batch.
        points: How they are compared.
    """

    queries: Tensor
    pixels: PixelMap
    points: Points

    def logits(self, image: int, layer: Tensor, query: Tensor) -> Tensor:
        """``[M, H_4, W_4]`` float32 of an image's queries, ``[M]`` each."""
        told = self.queries[layer, image, query].float()
        return torch.einsum("mc,chw->mhw", told, self.pixels.embedding[image].float())


def masks_of(output: GroupOutput, points: Points, first: bool = True) -> MaskPredictions | None:
    """Masks of every layer, if there are any.

    Args:
        output: Of the decoder.
        points: How they are compared.
        first: Begin with those before the first layer, where there are such.
    """
    if output.pixels is None or not output.masks:
        return None
    told = list(output.masks)
    if first and output.initial is not None and output.initial.masks is not None:
        told.insert(0, output.initial.masks)
    return MaskPredictions(torch.stack(told), output.pixels, points)


def proposed_masks(
    proposals: Proposals, pixels: PixelMap | None, points: Points
) -> MaskPredictions | None:
    """Masks of proposals, where they have any."""
    if proposals.masks is None or pixels is None:
        return None
    return MaskPredictions(proposals.masks[None], pixels, points)


def sampled(maps: Tensor, points: Tensor, extent: Tensor) -> Tensor:
    """Bilinear samples of maps, zero beyond their border.

    Args:
        maps: ``[M, C, h, w]``.
        points: ``[M, P, 2]`` (x, y) in [0, 1] of the image.
        extent: ``[2]`` (width, height) share of the map that the image covers.

    Returns:
        ``[M, C, P]``.
    """
    grid = (points * extent * 2 - 1)[:, :, None]
    return F.grid_sample(maps, grid, align_corners=False)[..., 0]


def sampled_masks(masks: Tensor, index: Tensor, points: Tensor, extent: Tensor) -> Tensor:
    """:func:`sampled` of ground-truth masks, of which many pairs may have the same.

    Args:
        masks: ``[G, H, W]`` bool.
        index: ``[M]`` the mask of each pair.
        points: ``[M, P, 2]``, see :func:`sampled`.
        extent: ``[2]``, see :func:`sampled`.

    Returns:
        ``[M, P]`` float32 in [0, 1].
    """
    height, width = masks.shape[-2:]
    place = points * extent
    x, y = place[..., 0] * width - 0.5, place[..., 1] * height - 0.5
    left, top = x.floor(), y.floor()
    found = torch.zeros_like(x)
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        across, down = left + column, top + row
        share = (1 - (x - across).abs()) * (1 - (y - down).abs())
        inside = (across >= 0) & (across < width) & (down >= 0) & (down < height)
        line, cell = down.clamp(0, height - 1).long(), across.clamp(0, width - 1).long()
        found += share * (masks[index[:, None], line, cell] & inside)
    return found


@torch.no_grad()
def uncertain_points(logits: Tensor, extent: Tensor, points: Points, image: int) -> Tensor:
    """Points ``[M, P, 2]`` where masks are least sure, and some anywhere (PointRend, section 3.1).

    Args:
        logits: ``[M, H_4, W_4]`` of an image's pairs.
        extent: ``[2]`` share of the map that the image covers.
        points: Their number and where from.
        image: Whose generator.
    """
    number, pairs = points.number, len(logits)
    chosen = int(IMPORTANT * number)
    many = points.draw(image, (pairs, OVERSAMPLING * number, 2), logits.device)
    anywhere = points.draw(image, (pairs, number - chosen, 2), logits.device)
    certain = sampled(logits[:, None], many, extent)[:, 0].abs()
    index = certain.topk(chosen, 1, largest=False, sorted=False).indices
    return torch.cat((many.gather(1, index[..., None].expand(-1, -1, 2)), anywhere), 1)


def mask_losses(
    masks: MaskPredictions, targets: Sequence[Target], matches: Matches, normalizer: Tensor
) -> dict[str, Tensor]:
    """Unweighted losses of matched masks, summed over layers.

    Args:
        masks: Of all queries.
        targets: Ground truth per image, with masks.
        matches: The assigned pairs.
        normalizer: Scalar every sum is divided by.

    Returns:
        ``mask``, the mean cross-entropy of a mask's points, and ``dice``, ``1 - dice`` of them
        (Milletari et al. 2016, with 1 added on both sides), scalars.
    """
    entropy = dice = torch.zeros((), device=masks.queries.device)
    for image, target in enumerate(targets):
        own = matches.where(matches.image == image)
        extents = _extents(masks, target, image)
        for start in range(0, len(own.box), CHUNK):
            part = own.take(torch.arange(start, min(start + CHUNK, len(own.box))).to(own.box))
            logits = masks.logits(image, part.layer, part.query)
            places = uncertain_points(logits, extents[0], masks.points, image)
            goal = sampled_masks(_masks(target), part.box, places, extents[1])
            told = sampled(logits[:, None], places, extents[0])[:, 0]
            entropy = (
                entropy
                + F.binary_cross_entropy_with_logits(told, goal, reduction="none").mean(1).sum()
            )
            p = told.sigmoid()
            share = (2 * (p * goal).sum(1) + 1) / (p.sum(1) + goal.sum(1) + 1)
            dice = dice + (1 - share).sum()
    return {"mask": entropy / normalizer, "dice": dice / normalizer}


@torch.no_grad()
def mask_terms(masks: MaskPredictions, targets: Sequence[Target]) -> tuple[Tensor, Tensor]:
    """Cross-entropy and ``1 - dice`` of every mask with every (padded) one of its image.

    All masks of an image are compared at the same points, which are anywhere within it.

    Returns:
        ``[L, B, N, G]`` each, float32; columns beyond an image's objects are 0.
    """
    layers, images, queries, _ = masks.queries.shape
    most = max(len(target.labels) for target in targets)
    shape = (layers, images, queries, most)
    entropy, dice = (torch.zeros(shape, device=masks.queries.device) for _ in range(2))
    for image, target in enumerate(targets):
        count = len(target.labels)
        if count == 0:
            continue
        places = masks.points.draw(image, (1, masks.points.number, 2), entropy.device)
        own, theirs = _extents(masks, target, image)
        pixels = sampled(masks.pixels.embedding[image : image + 1].float(), places, own)[0]
        every = torch.arange(count, device=places.device)
        goal = sampled_masks(_masks(target), every, places.expand(count, -1, -1), theirs)
        for layer in range(layers):
            told = masks.queries[layer, image].float() @ pixels  # [N, P]
            # Of a point: softplus(x) - x where it is inside, softplus(x) where not.
            loss = F.softplus(told).sum(1, keepdim=True) - told @ goal.T
            entropy[layer, image, :, :count] = loss / masks.points.number
            p = told.sigmoid()
            both = p.sum(1, keepdim=True) + goal.sum(1)
            dice[layer, image, :, :count] = 1 - (2 * (p @ goal.T) + 1) / (both + 1)
    return entropy, dice


def _masks(target: Target) -> Tensor:
    assert target.masks is not None, "a detector with masks learns from masks"
    return target.masks


def _extents(masks: MaskPredictions, target: Target, image: int) -> tuple[Tensor, Tensor]:
    """``[2]`` share that the image covers of the map, and of its ground truth's canvas."""
    height, width = _masks(target).shape[-2:]
    valid = masks.pixels.valid[image]
    pixels = valid * MASK_STRIDE
    canvas = torch.stack((pixels[0] / width, pixels[1] / height))
    return masks.pixels.extent[image], canvas
