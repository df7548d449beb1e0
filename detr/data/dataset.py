"""What a data set is, whatever its files look like on disk."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from detr.config import ClassMap
from detr.data.images import Exif, Header, read_header
from detr.data.kitti_rows import KittiLabels
from detr.errors import UserError
from detr.masks import Mask
from detr.types import FloatArray, ImageArray, ImageId, IntArray

Box = tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Ground truth of one image, in pixels of the image as read.

    Attributes:
        boxes: ``[G, 4]`` float32 x0 y0 x1 y1.
        labels: ``[G]`` int64 class indices.
        ignore: ``[I, 4]`` float32 regions in which a detection of any class is neither right nor
            wrong (KITTI ``DontCare``, COCO crowds, classes merged into "ignore").
        ignore_labels: ``[I]`` int64 class an ignore region is for, -1 for every class.
        masks: One for each of ``boxes``, of the image's size; None where nobody asked for them.
    """

    boxes: FloatArray
    labels: IntArray
    ignore: FloatArray
    ignore_labels: IntArray
    masks: tuple[Mask, ...] | None = None


@dataclass(frozen=True)
class Annotation:
    """One object or region as its label file has it.

    Attributes:
        where: File and line, or file and annotation id.
        box: x0 y0 x1 y1 pixels, not clipped.
        area: Square pixels, of the mask where the file gives one.
        label: Class index; -1 in a region that is ignored for every class.
        ignore: Whether it is an ignore region.
        attributes: What else the file tells of an object, by name: ``occlusion`` (in words),
            ``truncation`` (share outside the image), ``distance`` (meters).
        mask: Reads the mask, where the file has one for the object or region; raises UserError
            where it is bad. Who wants boxes alone pays nothing for it.
    """

    where: str
    box: Box
    area: float
    label: int
    ignore: bool
    attributes: Mapping[str, float | str] = field(default_factory=dict)
    mask: Callable[[], Mask] | None = field(default=None, compare=False, repr=False)


@dataclass
class Scan:
    """The annotations of one image, and what is wrong with them.

    Attributes:
        annotations: Those that count.
        errors: What stops training and scoring.
        warnings: What was left out or will be clipped.
    """

    annotations: list[Annotation] = field(default_factory=list)
    errors: list[UserError] = field(default_factory=list)
    warnings: list[UserError] = field(default_factory=list)


@dataclass(frozen=True)
class Protocols:
    """What a data set can be scored by beside COCO AP, which asks for boxes alone.

    Attributes:
        kitti: Labels as KITTI AP needs them (occlusion, truncation, ``DontCare``), or None where
            the files do not tell.
    """

    kitti: KittiLabels | None = None


class Dataset(ABC):
    """Images with labels, read lazily; index ``i`` runs over ``range(len(self))``.

    Attributes:
        spec: What the user typed (``kitti:PATH:val``), for messages.
        classes: Class names and category ids.
        exif: Whether an image that its EXIF data turn is read upright (``apply``, ``None``) or as
            stored (``ignore``); with ``None`` the labels have to tell which of the two they mean.
    """

    spec: str
    classes: ClassMap
    exif: Exif | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def image_id(self, i: int) -> ImageId:
        """What results files call the image: COCO's id, a KITTI frame's number."""

    @abstractmethod
    def image_path(self, i: int) -> Path: ...

    @abstractmethod
    def image_size(self, i: int) -> tuple[int, int]:
        """(height, width), without decoding the pixels."""

    def header(self, i: int) -> Header:
        """Of the picture's file; raises UserError where there is none or it is no picture."""
        return read_header(self.image_path(i))

    @abstractmethod
    def labels(self, i: int) -> Labels:
        """Raises UserError naming file and line where the labels are bad."""

    def labels_with_masks(self, i: int) -> Labels:
        """Those of :meth:`labels` with masks, but for objects that masks' rules leave out.

        Raises:
            UserError: ``mask-missing`` where an object has none, or what else is wrong with them.
        """
        raise UserError("mask-missing", f"{self.spec}: its labels tell no masks")

    @abstractmethod
    def image(self, i: int) -> ImageArray:
        """``[h, w, 3]`` RGB; raises UserError ``image-unreadable`` naming the file.

        uint8, or the values of a deeper picture for which the data set knows no range.
        """

    @property
    def value_range(self) -> tuple[float, float] | None:
        """The values of deeper pictures that :meth:`image` makes 0 and 255, where it does."""
        return None

    @property
    def protocols(self) -> Protocols:
        """Protocols that the labels are good for beside COCO's."""
        return Protocols()

    def scan(self, i: int) -> Scan:
        """All annotations of image ``i``, and what is wrong with them; never raises for that.

        Those of :meth:`labels`, unless the format knows what its files say before boxes are clipped
        and skipped.
        """
        labels = self.labels(i)
        where = f"{self.spec} image {i}"
        return Scan(
            [
                Annotation(where, (x0, y0, x1, y1), (x1 - x0) * (y1 - y0), int(label), ignore)
                for boxes, indices, ignore in (
                    (labels.boxes, labels.labels, False),
                    (labels.ignore, labels.ignore_labels, True),
                )
                for (x0, y0, x1, y1), label in zip(boxes.tolist(), indices, strict=True)
            ]
        )

    def scan_with_masks(self, i: int) -> Scan:
        """As :meth:`scan`, and what is wrong with the masks of the objects besides."""
        found = self.scan(i)
        if any(not annotation.ignore for annotation in found.annotations):
            found.errors.append(UserError("mask-missing", f"{self.spec}: its labels tell no masks"))
        return found

    def problems(self) -> list[UserError]:
        """What is wrong with the set as a whole: pairs with one half missing, doubled ids."""
        return []

    def warnings(self) -> list[UserError]:
        """What was left out of the set as a whole."""
        return []

    def annotations(self, i: int, masks: bool = False) -> list[Annotation]:
        """The annotations of image ``i`` that count, boxes as the files have them.

        Args:
            i: The image.
            masks: Whether objects without a mask that can be read do not count.

        Raises:
            UserError: The first thing wrong with the set or the image's labels.
        """
        scan = self.scan_with_masks(i) if masks else self.scan(i)
        for error in (*self.problems(), *scan.errors):
            raise error
        return scan.annotations

    def bounds(self, i: int) -> tuple[int, int] | None:
        """(height, width) that boxes are clipped to, where the labels themselves tell it."""
        return None


def evenly_spaced(count: int, limit: int | None) -> list[int]:
    """At most ``limit`` indices spread evenly over ``range(count)``."""
    kept = count if limit is None else min(limit, count)
    return [k * count // kept for k in range(kept)]
