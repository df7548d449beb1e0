"""What a student starts from, and what of it stays as it is."""

from __future__ import annotations

from pathlib import Path

from detr.config import ClassMap
from detr.errors import UserError
from detr.models import Detector
from detr.models.inherit import inherit
from detr.models.start import start
from detr.shipped import find_model
from distill.recipe import Recipe
from distill.teachers.open import OpenedTeacher
from distill.training.run_dir import RunDir


def set_first_weights(
    student: Detector, recipe: Recipe, classes: ClassMap, opened: OpenedTeacher | None, run: RunDir
) -> None:
    """Takes the weights a recipe starts from, says so, and freezes the parts it names.

    A run that goes on has its weights already; only the freezing is done again.

    Args:
        student: Changed in place.
        recipe: The run.
        classes: Of the training data.
        opened: The teacher, where there is one.
        run: Gets the line and, in ``log.txt``, the whole list.

    Raises:
        UserError: ``recipe-value`` for two starts, what :func:`detr.models.start.start` and
            :func:`detr.models.inherit.inherit` raise, and what :func:`freeze_parts` raises.
    """
    if recipe.start is not None and recipe.inherit is not None:
        raise UserError(
            "recipe-value",
            "start and inherit are two sources of the same weights; --set inherit=false or leave "
            "start out",
        )
    if not run.checkpoint.exists():
        _take(student, recipe, classes, opened, run)
    freeze_parts(student, recipe)


def _take(
    student: Detector, recipe: Recipe, classes: ClassMap, opened: OpenedTeacher | None, run: RunDir
) -> None:
    if recipe.start is not None:
        path = find_model(Path(recipe.start))
        report, info = start(student, path, classes, recipe.start_classes)
        verb = "started with"
        theirs, ours = info.preprocess, recipe.input
        if (theirs.mean, theirs.std) != (ours.mean, ours.std):
            run.say(
                f"start: {path} was trained on images normalized with mean {theirs.mean} and std "
                f"{theirs.std}, these have {ours.mean} and {ours.std} (input.mean, input.std)"
            )
    elif recipe.inherit is not None:
        assert opened is not None and opened.detector is not None  # the recipe has said so
        layers = recipe.inherit
        report = inherit(student, opened.detector, layers.encoder, layers.decoder, opened.columns)
        verb = "inherited"
    else:
        return
    run.say(report.text(verb, classes.names))
    run.note(report.details(verb, classes.names))


def freeze_parts(student: Detector, recipe: Recipe) -> None:
    """Freezes the parts a recipe names.

    Raises:
        UserError: ``freeze-part`` for a part that the detector does not have, or where nothing is
            left to train.
    """
    for part in recipe.freeze:
        if not student.freeze(part):
            raise UserError("freeze-part", f"freeze: {part}: this detector has none")
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise UserError("freeze-part", "freeze: no part of the detector is left to train")
