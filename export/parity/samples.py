"""The images two engines are compared on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from detr.data import Dataset
from detr.data.dataset import evenly_spaced
from detr.errors import UserError
from detr.types import Detections, ImageArray
from engines.bundle import Golden


@dataclass
class Samples:
    """The images two engines are compared on.

    Attributes:
        description: What they are, for people.
        names: One per image.
        dataset, indices: Where images and labels come from; ``None`` for given images.
        given: The images, where they do not come from a data set.
        known: What the reference finds in them, where that is known already.
    """

    description: str
    names: list[str]
    dataset: Dataset | None = None
    indices: list[int] = field(default_factory=list)
    given: Sequence[ImageArray] = ()
    known: Sequence[Detections] | None = None

    @staticmethod
    def of_golden(golden: Golden, ask_again: bool = False) -> Samples:
        """A bundle's own images, with what torch found in them unless it is to be asked again."""
        names = [f"golden image {i}" for i in range(len(golden.images))]
        known = None if ask_again else golden.detections
        return Samples("golden images", names, given=golden.images, known=known)

    @staticmethod
    def of_dataset(dataset: Dataset, count: int | None = None) -> Samples:
        """At most ``count`` images spread evenly over a data set.

        Raises:
            UserError: ``data-empty``.
        """
        indices = evenly_spaced(len(dataset), count) if len(dataset) else []
        if not indices:
            raise UserError("data-empty", f"{dataset.spec}: no images to verify on")
        names = [dataset.image_path(i).name for i in indices]
        return Samples(dataset.spec, names, dataset, indices)

    def __len__(self) -> int:
        return len(self.names)

    def image(self, position: int) -> ImageArray:
        """Image number ``position`` of the samples."""
        if self.dataset is not None:
            return self.dataset.image(self.indices[position])
        return self.given[position]

    def text(self) -> str:
        """``60 images of kitti:data:val``."""
        of = "images of " if self.dataset is not None else ""
        return f"{len(self)} {of}{self.description}"
