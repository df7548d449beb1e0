"""FGD: focal and global knowledge distillation (Yang et al., CVPR 2022).

Focal: squared errors of the map, weighted by ground-truth masks (objects by one over their cells,
background by one over its cells) and by the teacher's spatial and channel attention; both
attentions are imitated, too. Global: a GcNet block over each model's map, whose outputs are
compared.

All sums are divided by the number of images and summed over levels. Departures: cells in the
padding take no part in masks, attention or errors, and a box is placed by the image's share of the
map, where the released code places it as if the image filled the canvas. The global blocks, the
teacher's included, are trained, as in the released code.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from detr.config import Strict, Weight
from detr.models import TeacherPart
from distill.methods.base import Method, Setting, float32
from distill.methods.parts.feature_pairs import FeaturePairs, MapPair, Place
from distill.methods.parts.masks import scale_masks
from distill.methods.parts.pairing import split_levels
from distill.methods.step import Step


class FgdOptions(Strict):
    """Options of FGD; a weight of 0 switches its part off.

    Attributes:
        on: Which maps: ``backbone``, ``neck`` or ``memory`` (encoder output).
        foreground, background: Weights of the focal errors (the paper's alpha and beta).
        attention: Weight of the attention error (gamma).
        relation: Weight of the global error (lambda).
        temperature: Of the attention (T).
    """

    on: Place = "memory"
    foreground: Weight = 1e-3
    background: Weight = 5e-4
    attention: Weight = 1e-3
    relation: Weight = 5e-6
    temperature: Annotated[float, Field(ge=1e-3, le=1e6)] = 0.5


class Fgd(Method[FgdOptions]):
    """FGD (CVPR 2022): maps weighted by objects and by the teacher's attention, and relations.

    Raises:
        UserError: ``method-levels`` where student and teacher share no level.
    """

    name: ClassVar[str] = "fgd"
    reads_scores: ClassVar[bool] = False

    @classmethod
    def needs(cls, options: FgdOptions) -> frozenset[TeacherPart]:
        """The maps."""
        return frozenset({options.on})

    def __init__(self, options: FgdOptions, setting: Setting) -> None:
        super().__init__(options, setting)
        self.maps = FeaturePairs(
            self.options.on, setting.student.facts, setting.need_teacher().facts, self.name
        )
        self.student_blocks = nn.ModuleList(GcBlock(c) for c in self.maps.channels)
        self.teacher_blocks = nn.ModuleList(GcBlock(c) for c in self.maps.channels)

    def losses(self, step: Step) -> dict[str, Tensor]:
        """``foreground``, ``background``, ``attention`` and ``relation``."""
        options, memory = self.options, step.student_memory
        foreground, background = (
            split_levels(m, memory) for m in scale_masks(step.targets, memory)
        )
        parts: dict[str, list[Tensor]] = {
            "foreground": [], "background": [], "attention": [], "relation": []
        }  # fmt: skip
        blocks = zip(self.student_blocks, self.teacher_blocks, strict=True)
        for pair, level, (ours, theirs) in zip(
            self.maps(step), self.maps.indices(), blocks, strict=True
        ):
            space_t, channel_t = attention(pair.teacher, pair.valid, options.temperature)
            space_s, channel_s = attention(pair.student, pair.valid, options.temperature)
            error = (pair.student - pair.teacher).square() * channel_t[..., None, None]
            error = error.sum(1).flatten(1) * space_t
            parts["foreground"].append((error * foreground[level]).sum())
            parts["background"].append((error * background[level]).sum())
            parts["attention"].append(
                (space_s - space_t).abs().sum() + (channel_s - channel_t).abs().sum()
            )
            parts["relation"].append(_relation(pair, ours, theirs))
        images = len(step.targets)
        return {
            f"{self.name}/{part}": getattr(options, part) * torch.stack(terms).sum() / images
            for part, terms in parts.items()
        }


def attention(maps: Tensor, valid: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Where and in which channels a map is strong.

    Args:
        maps: ``[B, C, H, W]``.
        valid: ``[B, 1, H, W]`` bool.
        temperature: T.

    Returns:
        Spatial attention ``[B, H * W]``, whose mean over valid cells is 1, and channel attention
        ``[B, C]``, whose mean is 1.
    """
    strength = maps.abs()
    mask = valid.flatten(1)
    cells = mask.sum(1, keepdim=True).clamp(min=1)
    where = (strength.mean(1).flatten(1) / temperature).masked_fill(~mask, float("-inf"))
    means = (strength * valid).flatten(2).sum(-1) / cells
    return cells * where.softmax(1), maps.shape[1] * (means / temperature).softmax(1)


def _relation(pair: MapPair, ours: nn.Module, theirs: nn.Module) -> Tensor:
    """Summed squared error between the two blocks' outputs, off the padding."""
    student = float32(ours(pair.student, pair.valid))
    teacher = float32(theirs(pair.teacher, pair.valid))
    return ((student - teacher).square() * pair.valid).sum()


class GcBlock(nn.Module):
    """Global context block (GCNet, Cao et al. 2019) as FGD uses it.

    One softmax attention over all cells pools a context vector, a bottleneck transforms it, and it
    is added to every cell. The last layer starts at zero, so the block starts as the identity.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(1, channels // 2)
        self.mask = nn.Conv2d(channels, 1, 1)
        self.transform = nn.Sequential(
            nn.Linear(channels, hidden),
            nn.LayerNorm(hidden),
            nn.ReLU(),
            nn.Linear(hidden, channels),
        )
        nn.init.kaiming_normal_(self.mask.weight, mode="fan_in")
        last = cast(nn.Linear, self.transform[-1])
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, maps: Tensor, valid: Tensor) -> Tensor:
        """``[B, C, H, W]`` to the same shape."""
        scores = self.mask(maps).masked_fill(~valid, float("-inf")).flatten(1)
        context = torch.einsum("bs,bcs->bc", F.softmax(scores, 1), maps.flatten(2))
        out: Tensor = maps + self.transform(context)[..., None, None]
        return out
