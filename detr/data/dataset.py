"""What a data set is, whatever its files look like on disk."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from detr.config import ClassMap
from detr.types import FloatArray, ImageArray, IntArray


@dataclass(frozen=True)
class Labels:
    """Ground truth of one image, in pixels of the image as read.

    Attributes:
        boxes: ``[G, 4]`` float32 x0 y0 x1 y1.
        labels: ``[G]`` int64 class indices.
        ignore: ``[I, 4]`` float32 regions in which a detection of any class is neither right nor
            wrong (KITTI ``DontCare``, COCO crowds, classes merged into "ignore").
        ignore_labels: ``[I]`` int64 class an ignore region is for, -1 for every class.
    """

    boxes: FloatArray
    labels: IntArray
    ignore: FloatArray
    ignore_labels: IntArray


class Dataset(ABC):
    """Images with labels, read lazily; index ``i`` runs over ``range(len(self))``.

    Attributes:
        spec: What the user typed (``kitti:PATH:val``), for messages.
        classes: Class names and category ids.
    """

    spec: str
    classes: ClassMap

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def image_id(self, i: int) -> int:
        """COCO image id, or the frame number of a KITTI image."""

    @abstractmethod
    def image_path(self, i: int) -> Path: ...

    @abstractmethod
    def image_size(self, i: int) -> tuple[int, int]:
        """(height, width), without decoding the pixels."""

    @abstractmethod
    def labels(self, i: int) -> Labels:
        """Raises UserError naming file and line where the labels are bad."""

    @abstractmethod
    def image(self, i: int) -> ImageArray:
        """``[h, w, 3]`` uint8 RGB; raises UserError ``image-unreadable`` naming the file."""


def evenly_spaced(count: int, limit: int | None) -> list[int]:
    """At most ``limit`` indices spread evenly over ``range(count)``."""
    kept = count if limit is None else min(limit, count)
    return [k * count // kept for k in range(kept)]
