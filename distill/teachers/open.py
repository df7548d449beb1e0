"""The teacher: loaded, checked before anything is learned from it, and never changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from detr.config import ClassMap
from detr.data.dataset import Dataset
from detr.data.preprocess import PreprocessConfig
from detr.errors import GateError, UserError
from detr.models import Detector, Teacher, load_model
from detr.models.protocol import ObjectDetector
from detr.shipped import find_model
from distill.data.unreadable import LeaveOut
from distill.evaluate import Measured, measure_ap
from distill.recipe import Recipe
from distill.teachers.chosen_classes import ChosenClasses, columns_of
from distill.teachers.transformers import DETECTIONS, PREFIX, HuggingFaceTeacher, load

# Images the teacher's AP is measured on: enough to tell a good teacher from a broken one.
_SLICE = 64

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class OpenedTeacher:
    """A frozen teacher and where it came from.

    Attributes:
        teacher: The network.
        path: Its file or folder.
        columns: Its class of each class of the data.
        detector: The network itself, with all its classes, where it is one of ours, whose weights a
            student may start from.
    """

    teacher: Teacher
    path: Path
    columns: tuple[int, ...]
    detector: Detector | None = None


def open_teacher(recipe: Recipe, classes: ClassMap, device: torch.device) -> OpenedTeacher:
    """Loads a recipe's teacher and checks that it fits the recipe.

    Args:
        recipe: With a teacher.
        classes: Of the training data.
        device: Where the teacher goes; its convolutions become channels-last, which is fastest
            without gradients.

    Raises:
        UserError: What :func:`load_teacher`, :func:`distill.teachers.transformers.load` and
            :func:`distill.teachers.chosen_classes.columns_of` raise.
    """
    assert recipe.teacher is not None
    renamed = recipe.teacher_classes
    if recipe.teacher.startswith(PREFIX):
        path = Path(recipe.teacher.removeprefix(PREFIX))
        outside = freeze(load(path, recipe.input))
        columns = columns_of(recipe.teacher, outside.class_names, classes.names, renamed)
        chosen = _chosen(outside, columns, DETECTIONS)
        return OpenedTeacher(chosen.to(device), path, columns)
    path = find_model(Path(recipe.teacher))
    teacher, columns = load_teacher(path, classes, recipe.input, renamed)
    teacher = teacher.to(device).to(memory_format=torch.channels_last)
    chosen = _chosen(teacher, columns, teacher.config.detections)
    return OpenedTeacher(chosen.to(device), path, columns, teacher)


def _chosen(
    teacher: Detector | HuggingFaceTeacher, columns: tuple[int, ...], limit: int
) -> Detector | HuggingFaceTeacher | ChosenClasses:
    """The teacher as the data's classes want it: itself where they are its own, in its order."""
    if columns == tuple(range(teacher.facts.num_classes)):
        return teacher
    return freeze(ChosenClasses(teacher, columns, limit))


def tell_ap(
    recipe: Recipe,
    opened: OpenedTeacher,
    val: Dataset | None,
    say: Callable[[str], None],
    leave_out: LeaveOut | None = None,
) -> None:
    """Measures the teacher before anything is learned from it, and says what came out.

    Args:
        recipe: With a teacher.
        opened: The teacher.
        val: Validation data; without it there is no AP to tell.
        say: Takes lines for the log.
        leave_out: Takes images that cannot be read.

    Raises:
        UserError: What :func:`check_ap` raises; ``teacher-unmeasured`` where the recipe wants a
            least AP and has no validation data.
    """
    minimum, path = recipe.min_teacher_ap, opened.path
    if val is None:
        if minimum is not None:
            raise UserError(
                "teacher-unmeasured",
                f"min_teacher_ap: {minimum}: there is no data.val to measure {path} on",
            )
        return
    nms = None if opened.detector is None else opened.detector.config.nms
    masks = recipe.detector.heads.masks is not None
    result = check_ap(
        path, opened.teacher, val, recipe.input, _SLICE, minimum, nms, leave_out, masks
    )
    say(f"teacher {path.name}: {result.text()} on {result.boxes.images} images of {val.spec}")


def load_teacher(
    path: Path, classes: ClassMap, preprocess: PreprocessConfig, renamed: Mapping[str, str]
) -> tuple[Detector, tuple[int, ...]]:
    """A frozen teacher of ours that knows the student's classes and sees the student's images.

    Args:
        path: Run directory or ``X.safetensors``.
        classes: Of the training data.
        preprocess: Of the student: in distillation the teacher gets the same images.
        renamed: The teacher's names of those classes that have another name there.

    Returns:
        The teacher, on the CPU, in evaluation mode and without gradients, and its class of each
        class of the data.

    Raises:
        UserError: What :func:`distill.teachers.chosen_classes.columns_of` raises, ``teacher-input``
            where the teacher was trained on differently normalized images, or what
            :func:`detr.models.load_model` raises.
    """
    detector, info = load_model(path)
    columns = columns_of(path, info.classes.names, classes.names, renamed)
    if detector.facts.num_classes != len(info.classes):
        raise UserError(
            "teacher-classes",
            f"{path}: {detector.facts.num_classes} class outputs for {len(info.classes)} names",
        )
    if info.preprocess.range not in (None, preprocess.range):
        raise UserError(
            "teacher-input",
            f"{path}: the teacher's images have values from {info.preprocess.range}, the student's "
            f"from {preprocess.range}: give the training data the teacher's range",
        )
    if (info.preprocess.mean, info.preprocess.std) != (preprocess.mean, preprocess.std):
        raise UserError(
            "teacher-input",
            f"{path}: the teacher's images are normalized with mean {info.preprocess.mean} and std "
            f"{info.preprocess.std}, the student's with {preprocess.mean} and {preprocess.std}; "
            "they must agree (input.mean, input.std)",
        )
    return freeze(detector), columns


def freeze(detector: Network) -> Network:
    """Puts a detector into evaluation mode for good: no gradients, no denoising, no statistics."""
    return detector.requires_grad_(False).eval()


def check_ap(
    path: Path,
    teacher: ObjectDetector,
    dataset: Dataset,
    preprocess: PreprocessConfig,
    images: int | None,
    minimum: float | None,
    nms: float | None = None,
    leave_out: LeaveOut | None = None,
    masks: bool = False,
) -> Measured:
    """Measures the teacher where the student will be measured.

    Args:
        path: For the message.
        teacher: On the device that is to run it.
        dataset: Validation images.
        preprocess: Of the student.
        images: Measure on at most this many, spread evenly.
        minimum: Least AP, 0..1.
        nms: The teacher's, see :class:`detr.config.DetectorConfig`.
        leave_out: Takes images that cannot be read.
        masks: The data has masks, as a student with masks needs.

    Raises:
        UserError: ``teacher-weak`` where the AP is below ``minimum``.
    """
    measured = measure_ap(teacher, dataset, preprocess, images, nms, leave_out, masks)
    result = measured.boxes
    if minimum is not None and result.ap < minimum:
        raise GateError(
            "teacher-weak",
            f"{path}: AP {result.ap:.3f} on {result.images} images of {dataset.spec}, "
            f"at least {minimum:.3f} is wanted (min_teacher_ap)",
        )
    return measured
