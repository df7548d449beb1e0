"""Images that turn out to be unreadable: left out and told, so that one of them costs no run.

Headers of all images are read before the first step; what is cut off or damaged behind its header
shows only when its pixels are decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from detr.data.dataset import Dataset
from detr.errors import UserError
from detr.types import ImageArray

# Gets what was left out and why; raises where there is too much of it.
LeaveOut = Callable[[Path, UserError], None]

_CODES = frozenset({"image-unreadable", "image-missing"})


def is_unreadable(error: UserError) -> bool:
    """Whether an error is about one image's file, and not about the data set."""
    return error.code in _CODES


def readable(
    dataset: Dataset, indices: Iterable[int], leave_out: LeaveOut | None
) -> Iterator[tuple[int, ImageArray]]:
    """The images that can be read, with their indices.

    Args:
        dataset: Their data set.
        indices: Which ones.
        leave_out: Is told the others; without it the first one raises.

    Raises:
        UserError: What an image or ``leave_out`` raises.
    """
    for i in indices:
        try:
            yield i, dataset.image(i)
        except UserError as error:
            if leave_out is None or not is_unreadable(error):
                raise
            leave_out(dataset.image_path(i), error)
