"""FitNets: hints for thin deep nets (Romero et al., ICLR 2015), on a detector's features.

The student's maps, through a 1x1 convolution where the channels differ, follow the teacher's in the
mean squared error. The error is a mean over all cells of a level that belong to an image and over
channels, then over levels; the weight 10 is that of DETR distillation baselines.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from detr.config import Strict, Weight
from detr.models import TeacherPart
from distill.distributed import mean_over_processes
from distill.methods.base import Method, Setting
from distill.methods.parts.feature_pairs import FeaturePairs, Place
from distill.methods.step import Step


class FitNetOptions(Strict):
    """Options of FitNet.

    Attributes:
        on: Which maps: ``backbone``, ``neck`` or ``memory`` (encoder output).
        weight: Of the mean squared error.
    """

    on: Place = "memory"
    weight: Weight = 10.0


class FitNet(Method[FitNetOptions]):
    """FitNets (ICLR 2015): feature maps follow the teacher's in the mean squared error.

    Raises:
        UserError: ``method-levels`` where student and teacher share no level.
    """

    name: ClassVar[str] = "fitnet"
    reads_scores: ClassVar[bool] = False

    @classmethod
    def needs(cls, options: FitNetOptions) -> frozenset[TeacherPart]:
        """The maps."""
        return frozenset({options.on})

    def __init__(self, options: FitNetOptions, setting: Setting) -> None:
        super().__init__(options, setting)
        self.maps = FeaturePairs(
            self.options.on, setting.student.facts, setting.need_teacher().facts, self.name
        )

    def losses(self, step: Step) -> dict[str, Tensor]:
        """``features``."""
        terms = []
        for pair in self.maps(step):
            error = (pair.student - pair.teacher).square().mean(1, keepdim=True) * pair.valid
            cells = mean_over_processes(pair.valid.sum().to(torch.float32)).clamp(min=1)
            terms.append(error.sum() / cells)
        return {f"{self.name}/features": self.options.weight * torch.stack(terms).mean()}
