"""DeFeat: distilling object detectors via decoupled features (Guo et al., CVPR 2021).

Squared errors of feature maps, apart on objects and on background: ``weight / (2 N)`` times the sum
over the cells of either kind, N their number per level. The student's maps go through a 3x3
convolution, which starts as the identity: a student that begins with its teacher's weights need not
first unlearn them for a random map. Each level adds its error; padding is in none.

The paper's weights are for other detectors' maps; the defaults put the errors on an encoder memory
of width 256 near those of FitNet at weight 10. The part on proposals needs a two-stage detector
with a classification head per region and does not exist here.
"""

from __future__ import annotations

from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from detr.config import Strict, Weight
from detr.models import TeacherPart
from distill.distributed import mean_over_processes
from distill.methods.base import Method, Setting, float32
from distill.methods.parts.feature_pairs import FeaturePairs, Place
from distill.methods.parts.masks import scale_masks
from distill.methods.parts.pairing import split_levels
from distill.methods.step import Step


class DefeatOptions(Strict):
    """Options of DeFeat.

    Attributes:
        on: Which maps: ``backbone``, ``neck`` or ``memory`` (encoder output).
        foreground, background: Weights of the errors on objects and background (alpha).
    """

    on: Place = "memory"
    foreground: Weight = 0.08
    background: Weight = 0.04


class Defeat(Method[DefeatOptions]):
    """DeFeat (CVPR 2021): maps follow the teacher's, objects and background apart.

    Raises:
        UserError: ``method-levels`` where student and teacher share no level.
    """

    name: ClassVar[str] = "defeat"
    reads_scores: ClassVar[bool] = False

    @classmethod
    def needs(cls, options: DefeatOptions) -> frozenset[TeacherPart]:
        """The maps."""
        return frozenset({options.on})

    def __init__(self, options: DefeatOptions, setting: Setting) -> None:
        super().__init__(options, setting)
        self.maps = FeaturePairs(
            self.options.on, setting.student.facts, setting.need_teacher().facts, self.name
        )
        self.adapters = nn.ModuleList(_identity(channels) for channels in self.maps.channels)

    def losses(self, step: Step) -> dict[str, Tensor]:
        """``foreground`` and ``background``."""
        masks = [split_levels(m, step.student_memory) for m in _where(step)]
        terms: list[list[Tensor]] = [[], []]
        pairs = zip(self.maps(step), self.maps.indices(), self.adapters, strict=True)
        for pair, level, adapter in pairs:
            adapted = float32(adapter(pair.student * pair.valid))
            error = (adapted - pair.teacher).square().sum(1).flatten(1)
            for kind, mask in enumerate(masks):
                cells = mean_over_processes(mask[level].sum()).clamp(min=1e-6)
                terms[kind].append((error * mask[level]).sum() / (2 * cells))
        return {
            f"{self.name}/foreground": self.options.foreground * torch.stack(terms[0]).sum(),
            f"{self.name}/background": self.options.background * torch.stack(terms[1]).sum(),
        }


def _identity(channels: int) -> nn.Conv2d:
    """A 3x3 convolution that changes nothing yet."""
    adapter = nn.Conv2d(channels, channels, 3, padding=1)
    nn.init.dirac_(adapter.weight)
    nn.init.zeros_(cast(Tensor, adapter.bias))
    return adapter


def _where(step: Step) -> tuple[Tensor, Tensor]:
    """``[B, S]`` ones on objects and on background; zero in the padding."""
    foreground, background = scale_masks(step.targets, step.student_memory)
    return (foreground > 0).to(torch.float32), (background > 0).to(torch.float32)
