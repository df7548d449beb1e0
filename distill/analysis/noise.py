"""A data set of noise, for what only asks how large and how many: how long a step takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from detr.config import ClassMap
from detr.data.dataset import Dataset, Labels
from detr.masks import of_box
from detr.types import ImageArray

# Objects per image of COCO.
OBJECTS = 7


class Noise(Dataset):
    """Images of noise with boxes of all sizes, without end; a mask is its box.

    Args:
        size: (height, width) of every image, pixels.
        classes: Their number.
    """

    def __init__(self, size: tuple[int, int], classes: int) -> None:
        self.spec, self.size = "noise", size
        names = tuple(str(i) for i in range(classes))
        self.classes = ClassMap(names=names, category_ids=tuple(range(1, classes + 1)))

    def __len__(self) -> int:
        return 1000

    def image_id(self, i: int) -> int:
        return i

    def image_path(self, i: int) -> Path:
        return Path(f"noise-{i}")

    def image_size(self, i: int) -> tuple[int, int]:
        return self.size

    def labels(self, i: int) -> Labels:
        rng = np.random.default_rng(i)
        sides = rng.uniform(0.05, 0.4, (OBJECTS, 2))
        corner = rng.uniform(0, 1 - sides)
        scale = np.tile(self.size[::-1], 2)
        boxes = np.concatenate((corner, corner + sides), 1) * scale
        nothing = np.zeros((0, 4), dtype=np.float32)
        return Labels(
            boxes=boxes.astype(np.float32),
            labels=rng.integers(0, len(self.classes), OBJECTS),
            ignore=nothing,
            ignore_labels=np.zeros(0, dtype=np.int64),
        )

    def labels_with_masks(self, i: int) -> Labels:
        found = self.labels(i)
        return replace(found, masks=tuple(of_box(tuple(box)) for box in found.boxes.tolist()))

    def image(self, i: int) -> ImageArray:
        return np.random.default_rng(i).integers(0, 255, (*self.size, 3)).astype(np.uint8)
