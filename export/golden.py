"""The few images a bundle carries to prove itself on the target."""

from __future__ import annotations

from detr.config import ClassMap
from detr.data import open_dataset
from detr.data.synth.scene import render
from detr.types import ImageArray

COUNT = 4
_LEAST = 32  # pixels of a scene's side


def drawn_images(size: tuple[int, int]) -> list[ImageArray]:
    """Drawn road scenes of other sizes and aspects than the canvas; the same every time.

    Scenes and not noise: a model that finds nothing proves little, and equal patches make equal
    proposals, which two runtimes may rank either way.

    Args:
        size: Canvas (height, width).
    """
    height, width = size
    shapes = ((height, width), (height // 2, width), (height, width // 2), (height * 2, width * 2))
    return [
        render((max(h, _LEAST), max(w, _LEAST)), 0, index).image
        for index, (h, w) in enumerate(shapes)
    ]


def dataset_images(spec: str, classes: ClassMap) -> list[ImageArray]:
    """Images spread evenly over a data set.

    Raises:
        UserError: What opening the data set or an image raises.
    """
    dataset = open_dataset(spec, classes)
    count = min(COUNT, len(dataset))
    return [dataset.image(i * len(dataset) // count) for i in range(count)]
