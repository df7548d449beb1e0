"""The images two engines are compared on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from detr.data import Dataset
from detr.data.dataset import evenly_spaced
from detr.data.preprocess import PreprocessConfig
from detr.errors import UserError
from detr.types import Detections, ImageArray
from engines.bundle import Golden


def images_for(
    dataset: Dataset, count: int | None, preprocess: PreprocessConfig | None
) -> list[int]:
    """At most ``count`` indices, spread evenly over the images a canvas is meant for."""
    found = [
        i
        for i in range(len(dataset))
        if preprocess is None or preprocess.meant_for(*dataset.image_size(i))
    ]
    return [found[k] for k in evenly_spaced(len(found), count)] if found else []


@dataclass(frozen=True)
class Samples:
    """The images two engines are compared on.

    Attributes:
        description: What they are, for people.
        names: One per image.
        dataset, indices: Where images and labels come from; ``None`` for given images.
        images: The images, where they do not come from a data set.
        detections: The reference's, where they are known already.
    """

    description: str
    names: Sequence[str]
    dataset: Dataset | None = None
    indices: Sequence[int] = ()
    images: Sequence[ImageArray] = ()
    detections: Sequence[Detections] | None = None

    @staticmethod
    def of_golden(golden: Golden, with_detections: bool = True) -> Samples:
        """A bundle's own images, with torch's detections or for torch to be asked again."""
        names = [f"golden image {i}" for i in range(len(golden.images))]
        detections = golden.detections if with_detections else None
        return Samples("golden images", names, images=golden.images, detections=detections)

    @staticmethod
    def of_dataset(
        dataset: Dataset, count: int | None = None, preprocess: PreprocessConfig | None = None
    ) -> Samples:
        """At most ``count`` images spread evenly over a data set.

        Args:
            dataset: The images.
            count: How many at most; all where ``None``.
            preprocess: Leave out what its canvas is not meant for.

        Raises:
            UserError: ``data-empty``.
        """
        indices = images_for(dataset, count, preprocess)
        if not indices:
            which = "images of the bundle's orientation" if len(dataset) else "images"
            raise UserError("data-empty", f"{dataset.spec}: no {which} to verify on")
        names = [dataset.image_path(i).name for i in indices]
        return Samples(dataset.spec, names, dataset, indices)

    def __len__(self) -> int:
        return len(self.names)

    def image(self, position: int) -> ImageArray:
        """Image number ``position`` of the samples."""
        if self.dataset is not None:
            return self.dataset.image(self.indices[position])
        return self.images[position]

    def text(self) -> str:
        """``60 images of kitti:data:val``."""
        of = "images of " if self.dataset is not None else ""
        return f"{len(self)} {of}{self.description}"
