"""The teacher: loaded, checked before anything is learned from it, and never changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from detr.config import ClassMap
from detr.data.dataset import Dataset
from detr.data.preprocess import PreprocessConfig
from detr.errors import GateError, UserError
from detr.metrics.coco_ap import CocoAp
from detr.model_info import ModelInfo
from detr.models import Detector, Teacher, load_model
from detr.models.protocol import ObjectDetector
from detr.shipped import find_model
from distill.evaluate import measure_ap
from distill.recipe import Recipe
from distill.teachers.transformers import PREFIX, load

# Images the teacher's AP is measured on: enough to tell a good teacher from a broken one.
_SLICE = 64

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class OpenedTeacher:
    """A frozen teacher and where it came from.

    Attributes:
        teacher: The network.
        path: Its file or folder.
        detector: The same network where it is one of ours, whose weights a student may start from.
    """

    teacher: Teacher
    path: Path
    detector: Detector | None = None


def open_teacher(recipe: Recipe, classes: ClassMap, device: torch.device) -> OpenedTeacher:
    """Loads a recipe's teacher and checks that it fits the recipe.

    Args:
        recipe: With a teacher.
        classes: Of the training data.
        device: Where the teacher goes; its convolutions become channels-last, as the student's.

    Raises:
        UserError: What :func:`load_teacher` and :func:`distill.teachers.transformers.load` raise.
    """
    assert recipe.teacher is not None
    if recipe.teacher.startswith(PREFIX):
        path = Path(recipe.teacher.removeprefix(PREFIX))
        outside = load(path, classes, recipe.input, recipe.teacher_classes)
        return OpenedTeacher(freeze(outside).to(device), path)
    path = find_model(Path(recipe.teacher))
    teacher, _ = load_teacher(path, classes, recipe.input)
    teacher = teacher.to(device).to(memory_format=torch.channels_last)
    return OpenedTeacher(teacher, path, teacher)


def tell_ap(
    recipe: Recipe, opened: OpenedTeacher, val: Dataset | None, say: Callable[[str], None]
) -> None:
    """Measures the teacher before anything is learned from it, and says what came out.

    Args:
        recipe: With a teacher.
        opened: The teacher.
        val: Validation data; without it there is no AP to tell.
        say: Takes lines for the log.

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
    result = check_ap(path, opened.teacher, val, recipe.input, _SLICE, minimum)
    say(
        f"teacher {path.name}: AP {result.ap:.3f}, AP50 {result.ap50:.3f} on {result.images} "
        f"images of {val.spec}"
    )


def load_teacher(
    path: Path, classes: ClassMap, preprocess: PreprocessConfig
) -> tuple[Detector, ModelInfo]:
    """A frozen teacher that speaks of the student's classes and sees the student's images.

    Args:
        path: Run directory or ``X.safetensors``.
        classes: Of the training data.
        preprocess: Of the student: in distillation the teacher gets the same images.

    Returns:
        The teacher, on the CPU, in evaluation mode and without gradients, and its sidecar.

    Raises:
        UserError: ``teacher-classes`` where names or their order differ, ``teacher-input`` where
            the teacher was trained on differently normalised images, or what
            :func:`detr.models.load_model` raises.
    """
    detector, info = load_model(path)
    check_classes(path, info.classes.names, classes.names)
    if detector.facts.num_classes != len(classes):
        raise UserError(
            "teacher-classes",
            f"{path}: {detector.facts.num_classes} class outputs for {len(classes)} classes",
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
            f"{path}: the teacher's images are normalised with mean {info.preprocess.mean} and std "
            f"{info.preprocess.std}, the student's with {preprocess.mean} and {preprocess.std}; "
            "they must agree (input.mean, input.std)",
        )
    return freeze(detector), info


def freeze(detector: Network) -> Network:
    """Puts a detector into evaluation mode for good: no gradients, no denoising, no statistics."""
    return detector.requires_grad_(False).eval()


def check_classes(path: Path, teacher: Sequence[str], data: Sequence[str]) -> None:
    """Raises UserError ``teacher-classes`` naming what differs between two lists of classes."""
    if tuple(teacher) == tuple(data):
        return
    unknown = [name for name in data if name not in teacher]
    surplus = [name for name in teacher if name not in data]
    if unknown or surplus:
        told = []
        if unknown:
            told.append(f"the teacher does not know {_listed(unknown)}")
        if surplus:
            told.append(f"the data has no {_listed(surplus)}")
        raise UserError("teacher-classes", f"{path}: {'; '.join(told)}")
    index = next(i for i, pair in enumerate(zip(teacher, data, strict=True)) if pair[0] != pair[1])
    raise UserError(
        "teacher-classes",
        f"{path}: same classes in another order: class {index} is {teacher[index]} for the teacher "
        f"and {data[index]} in the data",
    )


def check_ap(
    path: Path,
    teacher: ObjectDetector,
    dataset: Dataset,
    preprocess: PreprocessConfig,
    images: int | None,
    minimum: float | None,
) -> CocoAp:
    """Measures the teacher where the student will be measured.

    Args:
        path: For the message.
        teacher: On the device that is to run it.
        dataset: Validation images.
        preprocess: Of the student.
        images: Measure on at most this many, spread evenly.
        minimum: Least AP, 0..1.

    Raises:
        UserError: ``teacher-weak`` where the AP is below ``minimum``.
    """
    result = measure_ap(teacher, dataset, preprocess, images)
    if minimum is not None and result.ap < minimum:
        raise GateError(
            "teacher-weak",
            f"{path}: AP {result.ap:.3f} on {result.images} images of {dataset.spec}, "
            f"at least {minimum:.3f} is wanted (min_teacher_ap)",
        )
    return result


def _listed(names: Sequence[str]) -> str:
    """A few names and how many more."""
    rest = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + rest
