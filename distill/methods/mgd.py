"""MGD: masked generative distillation (Yang et al., ECCV 2022).

A random part of the cells of the student's map is set to zero, and a small generator (3x3
convolution, ReLU, 3x3 convolution) has to make the teacher's whole map from the rest. The squared
error is summed over cells and channels, divided by the number of images, and summed over levels.
Each level has its own generator; padding is in no error.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from detr.config import Strict, Weight
from detr.models import TeacherPart
from distill.methods.base import Method, Setting, float32
from distill.methods.parts.feature_pairs import FeaturePairs, Place
from distill.methods.step import Step


class MgdOptions(Strict):
    """Options of MGD.

    Attributes:
        on: Which maps: ``backbone``, ``neck`` or ``memory`` (encoder output).
        dropped: Share of the cells that is set to zero (lambda).
        weight: Of the squared error (alpha).
    """

    on: Place = "memory"
    dropped: Annotated[float, Field(ge=0, le=1)] = 0.65
    weight: Weight = 2e-5


class Mgd(Method[MgdOptions]):
    """MGD (ECCV 2022): the teacher's maps are generated from a part of the student's.

    Raises:
        UserError: ``method-levels`` where student and teacher share no level.
    """

    name: ClassVar[str] = "mgd"
    reads_scores: ClassVar[bool] = False

    @classmethod
    def needs(cls, options: MgdOptions) -> frozenset[TeacherPart]:
        """The maps."""
        return frozenset({options.on})

    def __init__(self, options: MgdOptions, setting: Setting) -> None:
        super().__init__(options, setting)
        self.maps = FeaturePairs(
            self.options.on, setting.student.facts, setting.need_teacher().facts, self.name
        )
        self.generators = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(channels, channels, 3, padding=1),
            )
            for channels in self.maps.channels
        )

    def losses(self, step: Step) -> dict[str, Tensor]:
        """``features`` (weighted)."""
        terms = []
        for pair, generate in zip(self.maps(step), self.generators, strict=True):
            drawn = [torch.rand(pair.valid.shape[1:], generator=g) for g in step.generators]
            mask = torch.stack(drawn).to(pair.valid.device, non_blocking=True)
            kept = mask <= 1 - self.options.dropped
            made = float32(generate(pair.student * kept))
            terms.append(((made - pair.teacher).square() * pair.valid).sum())
        total = torch.stack(terms).sum() / len(step.targets)
        return {f"{self.name}/features": self.options.weight * total}
