"""The few images a bundle carries to prove itself on the target."""

from __future__ import annotations

from detr.config import ClassMap
from detr.data import open_dataset
from detr.data.preprocess import PreprocessConfig
from detr.data.synth.scene import render
from detr.types import ImageArray
from export.parity.samples import images_for

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


def dataset_images(spec: str, classes: ClassMap, preprocess: PreprocessConfig) -> list[ImageArray]:
    """Images spread evenly over a data set, as many for each canvas.

    Raises:
        UserError: What opening the data set or an image raises.
    """
    dataset = open_dataset(spec, classes)
    return [
        dataset.image(i)
        for canvas in preprocess.canvases
        for i in images_for(dataset, COUNT, preprocess.on(canvas))
    ]
