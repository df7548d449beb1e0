"""What is looked at before the first step: data, norms, map and queries that would spoil it."""

from __future__ import annotations

from collections.abc import Sequence

from torch.nn.modules.batchnorm import _BatchNorm

from detr.data import Dataset, inspect
from detr.data.findings import Findings
from detr.errors import UserError
from detr.models import Detector
from distill.recipe import Recipe
from distill.training.run_dir import RunDir


def with_range_of(data: Dataset, recipe: Recipe) -> Recipe:
    """The recipe of a model that carries the range of its training data.

    Raises:
        UserError: ``recipe-value`` where recipe and data YAML differ.
    """
    given, own = recipe.input.range, data.value_range
    if given not in (None, own):
        raise UserError(
            "recipe-value", f"input.range: {list(given)}, but {data.spec} says {list(own or ())}"
        )
    return recipe.model_copy(update={"input": recipe.input.model_copy(update={"range": own})})


def inspect_all(datasets: Sequence[Dataset], run: RunDir, masks: bool) -> list[Findings]:
    """Stops before the first step at what would stop, or spoil, a later one.

    Args:
        datasets: What is trained and validated on.
        run: Where warnings are said.
        masks: Whether masks are learned, so that one missing or wrong is an error.

    Raises:
        UserError: What :func:`detr.data.inspect` finds.
    """
    everything = [inspect(dataset, masks=masks) for dataset in datasets]
    for found in everything:
        found.stop()
        if found.warnings:
            run.say(found.summary())
    return everything


def check_norm(student: Detector) -> None:
    """Refuses what learns nothing: statistics of no data, kept for ever.

    Raises:
        UserError: ``backbone-frozen-norm``.
    """
    backbone = student.config.backbone
    frozen = backbone.norm == "frozen" and backbone.pretrained is None
    if frozen and any(isinstance(m, _BatchNorm) for m in student.backbone.modules()):
        raise UserError(
            "backbone-frozen-norm",
            "detector.backbone.norm: frozen, but there are no pretrained weights whose statistics "
            "it could keep: set norm: train, or name weights as detector.backbone.pretrained",
        )


def check_map(student: Detector, recipe: Recipe, images: int) -> None:
    """Refuses a batch norm over a single value, which torch does in the middle of the first step.

    Raises:
        UserError: ``recipe-value``.
    """
    size, stride = recipe.input.size, student.config.backbone.strides[-1]
    trained = [m for m in student.backbone.modules() if isinstance(m, _BatchNorm) and m.training]
    if size is not None and images == 1 and max(size) <= stride and trained:
        raise UserError(
            "recipe-value",
            f"input.size: {size[0]}x{size[1]} is one cell of the backbone's map of stride {stride} "
            "and batch norm learns nothing from one value: take a larger size, a larger "
            "batch_size, or detector.backbone.norm: frozen",
        )


def tell_queries(student: Detector, everything: Sequence[Findings], run: RunDir) -> None:
    """Says where an image has more objects than the detector can ever find."""
    config = student.config
    kept = {"queries.number": config.queries.total, "detections": config.detections}
    for found in everything:
        for key, number in kept.items():
            if number < found.most_objects:
                run.say(
                    f"{found.data}: an image has {found.most_objects} objects, the detector finds "
                    f"at most {number} (detector.{key})"
                )
