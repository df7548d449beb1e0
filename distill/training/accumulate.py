"""A step's images in several parts, one after the other, for memory that does not hold them all.

A recipe means the same training however its images are spread over processes and parts: losses are
divided by what all of them have, and gradients are means over all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from detr.errors import UserError
from distill.data.batches import Batch
from distill.distributed import Parts, World
from distill.recipe import Recipe


@dataclass(frozen=True)
class Share:
    """What a part must know of the whole step.

    Attributes:
        normalizer: See :class:`distill.methods.step.Step`.
        most: Largest box count of an image, of all parts of all processes.
        generator: For all images.
        generators: One per image of the part.
    """

    normalizer: Tensor
    most: int
    generator: torch.Generator
    generators: list[torch.Generator]


def images_per_process(recipe: Recipe, world: World) -> int:
    """This process's images of a step.

    Raises:
        UserError: ``batch-split`` where processes and parts cannot have equally many.
    """
    parts = world.size * recipe.accumulate
    if recipe.batch_size % parts:
        raise UserError(
            "batch-split",
            f"batch_size: {recipe.batch_size} images cannot be shared equally by {world.size} "
            f"processes x accumulate {recipe.accumulate}; take a multiple of {parts}",
        )
    return recipe.batch_size // world.size


def split(batch: Batch, parts: int) -> list[Batch]:
    """A batch as so many equal ones."""
    size = len(batch.targets) // parts
    slices = [slice(i * size, (i + 1) * size) for i in range(parts)]
    return [
        Batch(batch.images[s], batch.valid_sizes[s], batch.targets[s], batch.paths[s])
        for s in slices
    ]


def note_statistics(
    parts: int, look: Callable[[int], object], modules: list[nn.Module]
) -> Parts | None:
    """What all parts of a step share; ``None`` where the first one asks for nothing.

    Args:
        parts: Their number.
        look: Computes the losses of one part.
        modules: Whose running statistics are put back: every image counts once.
    """
    kept = [(b, b.clone()) for module in modules for b in module.buffers()]
    shared = Parts()
    with torch.no_grad():
        for part in range(parts):
            with shared.part(first_pass=True):
                look(part)
            if not shared.noted[0]:
                break
        for buffer, value in kept:
            buffer.copy_(value)
    if not shared.noted[0]:
        return None
    shared.close_first_pass()
    return shared
