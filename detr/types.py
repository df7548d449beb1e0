"""Value types every room shares, numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

import numpy as np
import numpy.typing as npt

from detr.masks import Rle

if TYPE_CHECKING:
    import supervision

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
# [h, w, 3] RGB: 8 bits, or the values of a deeper picture that has not been scaled to 8 bits yet.
ImageArray = npt.NDArray[np.uint8] | npt.NDArray[np.uint16] | npt.NDArray[np.float32]
# COCO files in the wild name images by number or by text.
ImageId = int | str


def is_image_id(value: object) -> TypeGuard[ImageId]:
    """Whether a value from a JSON file is an image id: a whole number or text."""
    return isinstance(value, int | str) and not isinstance(value, bool)


@dataclass(frozen=True)
class Detections:
    """What a detector found in one image, best first.

    Attributes:
        boxes: ``[N, 4]`` float32, x0 y0 x1 y1 in pixels of the original image.
        scores: ``[N]`` float32 in [0, 1], descending.
        labels: ``[N]`` int64, index into the model's class list.
        masks: N masks of the original image's size; None where the detector finds boxes alone.
    """

    boxes: FloatArray
    scores: FloatArray
    labels: IntArray
    masks: tuple[Rle, ...] | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def above(self, score: float) -> Detections:
        """The detections with a score of at least ``score``."""
        return self.take(np.flatnonzero(self.scores >= score))

    def take(self, rows: npt.NDArray[np.integer]) -> Detections:
        """Those of these indices, in their order."""
        masks = None if self.masks is None else tuple(self.masks[k] for k in rows)
        return Detections(self.boxes[rows], self.scores[rows], self.labels[rows], masks)

    def to_supervision(self, names: Sequence[str] = ()) -> supervision.Detections:
        """The same for the library supervision, which draws, tracks and counts.

        Args:
            names: The model's class names in order (``engine.info.classes.names``); with them each
                detection carries its own as ``data["class_name"]``.

        Raises:
            UserError: ``extra-missing`` where supervision is not installed.
        """
        try:
            import supervision
        except ModuleNotFoundError as error:
            from detr.cli_support import missing_extra

            raise missing_extra(error, "Detections.to_supervision") from error
        data = {"class_name": np.array(names)[self.labels]} if names else {}
        pixels = [mask.pixels() for mask in self.masks or ()]
        return supervision.Detections(
            xyxy=self.boxes, confidence=self.scores, class_id=self.labels, data=data,
            mask=np.stack(pixels) if pixels else None,
        )  # fmt: skip
