"""The few images a bundle carries to prove itself on the target."""

from __future__ import annotations

import numpy as np

from detr.config import ClassMap
from detr.data import open_dataset
from detr.types import ImageArray

COUNT = 4


def drawn_images(size: tuple[int, int]) -> list[ImageArray]:
    """Noise over gradients, of other sizes and aspects than the canvas; the same every time.

    Args:
        size: Canvas (height, width).
    """
    generator = np.random.default_rng(0)
    height, width = size
    shapes = ((height, width), (height // 2, width), (height, width // 2), (height * 2, width * 2))
    return [_drawn_image(generator, max(h, 1), max(w, 1)) for h, w in shapes]


def _drawn_image(generator: np.random.Generator, height: int, width: int) -> ImageArray:
    """Coarse coloured patches, a gradient and fine noise: all frequencies, no file needed."""
    patches = generator.uniform(0, 160, (height // 24 + 1, width // 24 + 1, 3))
    image = patches.repeat(24, 0).repeat(24, 1)[:height, :width]
    image = image + np.linspace(0, 60, width)[None, :, None]
    image = image + generator.uniform(0, 30, (height, width, 3))
    return image.clip(0, 255).astype(np.uint8)


def dataset_images(spec: str, classes: ClassMap) -> list[ImageArray]:
    """Images spread evenly over a data set.

    Raises:
        UserError: What opening the data set or an image raises.
    """
    dataset = open_dataset(spec, classes)
    count = min(COUNT, len(dataset))
    return [dataset.image(i * len(dataset) // count) for i in range(count)]
