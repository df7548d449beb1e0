"""What a distillation method is: extra query groups and losses over what comes back.

A training step asks every method the same questions in the same order, so a new paper is one new
file and never an edit of the training loop:

1. both encoders have run and both models have their own queries: :meth:`Method.groups`;
2. the teacher has decoded all its groups in one call: :meth:`Method.followup_groups`;
3. the student has decoded all its groups in one call: :meth:`Method.detection_losses` and
   :meth:`Method.losses`;
4. the optimizer has stepped: :meth:`Method.after_step`.

Modules a method brings along (adapters, generators, frozen tables) are made in its ``__init__``,
before the optimizer, and are saved with the checkpoint like any other module's state. They are
never part of the student that is exported.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Generic, TypeVar, get_args, get_origin

import torch
from torch import Tensor, nn

from detr.config import Strict
from detr.data.preprocess import PreprocessConfig
from detr.models import Detector, QueryGroup, Teacher, TeacherPart
from detr.models.protocol import WITHOUT_MASKS
from distill.losses.weights import LossWeights
from distill.methods.step import PairedGroup, Step, TeacherKind

# Normalized by ImageNet's mean and deviation; the size says nothing.
IMAGENET = PreprocessConfig(size=(640, 640))
MethodOptions = TypeVar("MethodOptions", bound=Strict)


@dataclass(frozen=True)
class Setting:
    """What a method may know when it is built.

    Attributes:
        student: The network to be trained; not to be kept (it is in every step).
        teacher: The frozen network, or ``None``.
        loss: Weights of the detection loss, for methods that train extra queries on ground truth.
        steps: Length of the run; 0 where nobody knows.
        drops: Steps at which the learning rate falls, ascending.
        preprocess: How images were made; only their normalization counts.
    """

    student: Detector
    teacher: Teacher | None
    loss: LossWeights = field(default_factory=LossWeights)
    steps: int = 0
    drops: tuple[int, ...] = ()
    preprocess: PreprocessConfig = IMAGENET

    def need_teacher(self) -> Teacher:
        """The teacher of a method that cannot do without (:func:`build_methods` has checked)."""
        assert self.teacher is not None
        return self.teacher


class Method(nn.Module, ABC, Generic[MethodOptions]):
    """A distillation paper: ``class Qskd(Method[QskdOptions])``.

    What several questions need of one step is computed in a :class:`distill.methods.step.PerStep`.

    Args:
        options: Of the recipe, validated.
        setting: What the method may know when it is built.

    Attributes:
        name: What recipes call it; the first part of its roles and loss keys.
        Options: The class of its options, which names it in its base; ``Strict`` has none.
        teacher: ``frozen`` is the recipe's teacher, ``ema`` the running average of the student
            (``Step.teacher`` then holds it), ``none`` a method that needs neither.
        replaces_detection_loss: It answers :meth:`detection_losses`; one method of a run may.
        reads_scores: It looks at class scores, which it takes for sigmoids.
    """

    name: ClassVar[str]
    Options: ClassVar[type[Strict]] = Strict
    teacher: ClassVar[TeacherKind] = "frozen"
    replaces_detection_loss: ClassVar[bool] = False
    reads_scores: ClassVar[bool] = True

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for base in cls.__dict__.get("__orig_bases__", ()):
            if get_origin(base) is Method:
                (cls.Options,) = get_args(base)

    def __init__(self, options: MethodOptions, setting: Setting) -> None:
        super().__init__()
        self.options = options

    @classmethod
    def needs(cls, options: MethodOptions) -> frozenset[TeacherPart]:
        """Which parts of its teacher the method reads; without an answer, all but masks."""
        return WITHOUT_MASKS

    @property
    def needs_teacher(self) -> bool:
        """Whether ``Step.teacher`` must be there."""
        return self.teacher != "none"

    @property
    def needs_attention(self) -> bool:
        """Whether the decoders must hand out their attention."""
        return False

    @property
    def self_attention(self) -> frozenset[str]:
        """Roles of the groups, of either model, whose self-attention maps the method reads."""
        return frozenset()

    def updates_teacher(self, index: int) -> bool:
        """Whether the weight average may follow the student after step ``index`` (from 0).

        It stands still as soon as one method says no.
        """
        return True

    def groups(self, step: Step) -> list[PairedGroup]:
        """Extra queries to be decoded by the student, the teacher or both.

        Args:
            step: With memories and own groups of both models, without any decoder output.
        """
        return []

    def followup_groups(self, step: Step) -> list[QueryGroup]:
        """Extra queries of the student that are made from what the teacher's decoder said.

        Args:
            step: As in :meth:`groups`, with ``teacher_outputs``.
        """
        return []

    def detection_losses(self, step: Step) -> dict[str, Tensor] | None:
        """The weighted detection losses that stand in for the criterion's, or ``None``.

        Only asked where :attr:`replaces_detection_loss` is set.
        """
        return None

    @abstractmethod
    def losses(self, step: Step) -> dict[str, Tensor]:
        """Weighted scalar losses under keys ``name/part``, to be summed.

        Finite, and zero where an image without objects leaves nothing to learn. In distributed
        training the mean over processes is what one process with all the images would compute.

        Args:
            step: With the outputs of both decoders.
        """

    def after_step(self, step: Step) -> None:
        """Called when the optimizer has stepped."""


def align(student_width: int, teacher_width: int) -> nn.Module:
    """A linear map from the student's width to the teacher's; the identity where they agree."""
    if student_width == teacher_width:
        return nn.Identity()
    return nn.Linear(student_width, teacher_width)


def float32(tensor: Tensor) -> Tensor:
    """The tensor in float32: logarithms and small differences do not survive autocast's halves."""
    return tensor.to(torch.float32)
