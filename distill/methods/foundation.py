"""RT-DETRv4: a vision foundation model teaches the encoder's coarsest map (Liao et al. 2025).

Deep semantic injection (section 3.2): what the encoder's attention makes of the coarsest map goes
through a linear map to the teacher's width and follows the teacher's tokens in the cosine of each
cell. Gradient-guided adaptive modulation (section 3.3): the loss weighs so much that the gradients
of the encoder's attention layers keep a share of all gradients. Numbers are the released code's for
its smallest model; there the teacher is DINOv3, whose license is Meta's own.

No detector teaches here, so no ``teacher`` is needed.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from detr.config import Positive, Strict, Weight, Word
from detr.errors import UserError
from distill.distributed import mean_over_processes
from distill.methods.base import Method, Setting, float32
from distill.methods.parts.pairing import split_levels
from distill.methods.step import Step, TeacherKind
from distill.teachers.foundation import open_foundation

# A weight is changed by so much at most at a time, as in the released code.
_LARGEST_CHANGE = 10.0

Fraction = Annotated[float, Field(gt=0, lt=1)]


class FoundationOptions(Strict):
    """Options of the foundation teacher.

    Attributes:
        model: A vision transformer of timm's by name, or ``hf:FOLDER`` of the transformers library.
        weights: File with the timm model's weights; ``None`` for those timm downloads.
        weight: Of the loss in the beginning.
        gradient_share: Share of the gradients' absolute values that the encoder's attention layers
            are to have; ``None`` leaves the weight as it is.
        tolerance: How far from it the share may be.
        every: Steps over which the share is a mean before the weight follows.
        until: Share of the run after which ``final_weight`` is the weight.
        final_weight: The weight from then on, and where no gradient reaches those layers.
    """

    model: Word = "vit_base_patch14_dinov2.lvd142m"
    weights: Word | None = None
    weight: Weight = 5.0
    gradient_share: Fraction | None = 0.11
    tolerance: Fraction = 0.01
    every: Positive = 3664
    until: Annotated[float, Field(gt=0, le=1)] = 0.909
    final_weight: Weight = 20.0

    @model_validator(mode="after")
    def _within(self) -> FoundationOptions:
        share, room = self.gradient_share, self.tolerance
        if share is not None and not 0 < share - room < share + room < 1:
            raise ValueError(f"gradient_share {share:g}, {room:g} more or less, leaves 0 to 1")
        return self


class FoundationTeacher(Method[FoundationOptions]):
    """A foundation model teaches the encoder's coarsest map.

    Raises:
        UserError: What :func:`distill.teachers.foundation.open_foundation` raises, and
            ``method-levels`` for a student whose encoder has no layers to be taught and a
            ``gradient_share``.
    """

    name: ClassVar[str] = "foundation"
    teacher: ClassVar[TeacherKind] = "none"
    reads_scores: ClassVar[bool] = False

    strength: Tensor
    share: Tensor
    counted: Tensor

    def __init__(self, options: FoundationOptions, setting: Setting) -> None:
        super().__init__(options, setting)
        facts = setting.student.facts
        if options.gradient_share is not None and facts.encoder_layers == 0:
            raise UserError(
                "method-levels",
                f"methods.{self.name}: the encoder has no layers whose gradients could have a "
                "share: set gradient_share to null",
            )
        self.model = open_foundation(options.model, options.weights, f"methods.{self.name}")
        self.project = nn.Linear(facts.neck_width, self.model.width)
        self.stride, self.given, self.steps = facts.strides[-1], setting.preprocess, setting.steps
        self.register_buffer("strength", torch.tensor(float(options.weight)))
        self.register_buffer("share", torch.zeros(()))
        self.register_buffer("counted", torch.zeros((), dtype=torch.int64))

    def losses(self, step: Step) -> dict[str, Tensor]:
        """``map``: one minus the cosine, a mean over the cells of all images."""
        memory = step.student_memory
        cells = memory.shapes[-1]
        ours = float32(self.project(split_levels(memory.layers[-1], memory)[-1]))
        theirs = self.model(step.images, cells, self.stride, self.given)
        valid = ~split_levels(memory.padding, memory)[-1]
        error = (1 - functional.cosine_similarity(ours, theirs, dim=-1)) * valid
        count = mean_over_processes(valid.sum().to(torch.float32)).clamp(min=1)
        return {f"{self.name}/map": self._weight(step.index) * error.sum() / count}

    def _weight(self, index: int) -> Tensor:
        if self._ended(index):
            return torch.full_like(self.strength, self.options.final_weight)
        return self.strength.clone()

    def _ended(self, index: int) -> bool:
        modulated = self.options.gradient_share is not None and self.steps > 0
        return modulated and index >= round(self.options.until * self.steps)

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        """Looks at the gradients, and once in a while changes the weight."""
        if self.options.gradient_share is None or self._ended(step.index):
            return
        encoder = step.student.encoder.named_parameters()
        taught = {id(p) for name, p in encoder if name.startswith("layers.")}
        norms = {
            own: [
                p.grad.abs().sum()
                for p in step.student.parameters()
                if p.grad is not None and (id(p) in taught) == own
            ]
            for own in (True, False)
        }
        if norms[True]:
            inside = torch.stack(norms[True]).sum()
            everything = inside + sum(norms[False], inside.new_zeros(()))
            self.share += (inside / everything.clamp(min=1e-30)).to(self.share)
        self.counted += 1
        if (step.index + 1) % self.options.every == 0:
            mean = float(self.share) / int(self.counted)
            self.strength.fill_(self.changed(float(self.strength), mean))
            self.share.zero_()
            self.counted.zero_()

    def changed(self, weight: float, share: float) -> float:
        """The weight that brings a share of the gradients back to where it is to be.

        If the layers' gradients were all this loss's, they would grow as the weight does, so the
        odds of the share would, too.

        Args:
            weight: Until now.
            share: Mean share of the gradients with it.
        """
        wanted, tolerance = self.options.gradient_share, self.options.tolerance
        assert wanted is not None
        if share < 1e-8:
            return self.options.final_weight
        if abs(share - wanted) <= tolerance or share >= 1:
            return weight
        goal = wanted + tolerance if share < wanted else wanted - tolerance
        ratio = goal * (1 - share) / (share * (1 - goal))
        return weight * min(max(ratio, 1 / _LARGEST_CHANGE), _LARGEST_CHANGE)
