"""What an engine is: one protocol over every runtime; parity, AP and latency are written once.

``prepare`` and ``finish`` are the same for all engines; an engine adds ``_infer``. ``run`` alone is
what a benchmark calls engine time; the three together are end-to-end time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from detr.data.preprocess import Inputs, preprocess
from detr.errors import UserError
from detr.mask_scaling import MaskScaling, image_masks
from detr.masks import Rle
from detr.model_info import BundledInfo
from detr.suppression import suppress
from detr.types import Detections, FloatArray, ImageArray, IntArray


@dataclass(frozen=True)
class RawMasks:
    """Masks of a batch as the graph gives them, and what enlarges them.

    Attributes:
        logits: ``[B, T, h, w]`` float32 on cells of the canvas.
        scaling: How they become masks.
        valid_sizes: ``[B, 2]`` (height, width) of each image inside the canvas.
        original_sizes: ``[B, 2]`` of each image as read.
    """

    logits: FloatArray
    scaling: MaskScaling
    valid_sizes: FloatArray
    original_sizes: FloatArray

    def first(self, count: int) -> RawMasks:
        """Those of the first images."""
        return RawMasks(
            self.logits[:count], self.scaling, self.valid_sizes[:count], self.original_sizes[:count]
        )


@dataclass(frozen=True)
class RawDetections:
    """A batch of results as the graph gives them.

    Attributes:
        boxes: ``[B, T, 4]`` float32, x0 y0 x1 y1 in pixels of the original image.
        scores: ``[B, T]`` float32, descending.
        labels: ``[B, T]`` int64 class indices.
        masks: Of a detector that finds them.
    """

    boxes: FloatArray
    scores: FloatArray
    labels: IntArray
    masks: RawMasks | None = None

    @staticmethod
    def of(
        outputs: Sequence[npt.NDArray[Any]], inputs: Inputs, scaling: MaskScaling | None = None
    ) -> RawDetections:
        """From the outputs of a graph in their order.

        Args:
            outputs: Boxes, scores, labels, and mask logits of a detector that finds masks.
            inputs: What the graph was given.
            scaling: How the logits become masks; the usual way where ``None``.
        """
        boxes, scores, labels, *logits = outputs
        if not logits:
            return RawDetections(boxes, scores, labels)
        sizes = inputs.valid_sizes, inputs.original_sizes
        masks = RawMasks(logits[0], scaling or MaskScaling(), *sizes)
        return RawDetections(boxes, scores, labels, masks)

    def first(self, count: int) -> RawDetections:
        """Those of the first images."""
        masks = None if self.masks is None else self.masks.first(count)
        return RawDetections(self.boxes[:count], self.scores[:count], self.labels[:count], masks)

    def enlarged(self) -> list[tuple[Rle, ...]] | None:
        """The masks of each image in its own size; ``None`` where there are none."""
        if self.masks is None:
            return None
        found = []
        told = self.masks
        for i, (height, width) in enumerate(told.original_sizes.astype(int).tolist()):
            valid = told.valid_sizes[i].tolist()
            found.append(
                image_masks(
                    told.logits[i], self.boxes[i], (valid[0], valid[1]), (height, width),
                    told.scaling,
                )
            )  # fmt: skip
        return found

    def detections(self, masks: list[tuple[Rle, ...]] | None) -> list[Detections]:
        """What was found in each image.

        Args:
            masks: What :meth:`enlarged` returned.
        """
        per_image = masks if masks is not None else [None] * len(self.boxes)
        return [
            Detections(*one)
            for one in zip(self.boxes, self.scores, self.labels, per_image, strict=True)
        ]


def filled(inputs: Inputs, size: int) -> Inputs:
    """A batch brought to a size by repeating its last image."""
    missing = size - len(inputs.images)
    if missing <= 0:
        return inputs
    return Inputs(
        *(
            np.concatenate([array, np.repeat(array[-1:], missing, axis=0)])
            for array in (inputs.images, inputs.valid_sizes, inputs.original_sizes)
        )
    )


class Engine(ABC):
    """A model ready to run.

    Attributes:
        name: Name of the runtime, as ``open_engine`` takes it.
        info: Architecture, classes and preprocessing of the model.
        artifact: The file whose hash identifies what runs.
        versions: Version of each package that matters for the result; ``attention`` says what
            computes the deformable attention: our kernel, or a body of standard operators.
        batch_size: Largest batch of one run, ``None`` where any will do.
        on_gpu: Whether it computes on a GPU, whose clocks then matter for its speed.
    """

    name: str
    info: BundledInfo
    artifact: Path
    versions: dict[str, str]
    batch_size: int | None
    on_gpu: bool = False

    @property
    def artifacts(self) -> tuple[Path, ...]:
        """Every file that runs; more than one where images of two orientations have theirs."""
        return (self.artifact,)

    def prepare(self, images: Sequence[ImageArray]) -> Inputs:
        """Scales, normalizes and pads ``[h, w, 3]`` uint8 RGB images.

        Raises:
            UserError: ``image-shape`` where an image is something else.
        """
        return preprocess(images, self.info.preprocess)

    def run(self, inputs: Inputs) -> RawDetections:
        """The engine alone: a prepared batch in, arrays out.

        A batch smaller than a static batch size is filled up and the filling thrown away, so it
        costs as much as a full one.

        Raises:
            UserError: ``batch-too-large`` where the engine was built for fewer images.
        """
        count = len(inputs.images)
        if self.batch_size is None or count == self.batch_size:
            return self._infer(inputs)
        if count > self.batch_size:
            raise UserError(
                "batch-too-large",
                f"{self.artifact}: a batch of {count} images, but it was exported for "
                f"{self.batch_size}; export with --batch {count} or --batch dynamic",
            )
        full = self._infer(filled(inputs, self.batch_size))
        return full.first(count)

    def finish(
        self, raw: RawDetections, masks: list[tuple[Rle, ...]] | None = None
    ) -> list[Detections]:
        """Splits a batch into detections per image, without duplicates where the model says so.

        Args:
            raw: The batch.
            masks: ``raw.enlarged()``, where that was done before.
        """
        found = raw.detections(raw.enlarged() if masks is None else masks)
        nms = self.info.nms
        return found if nms is None else [suppress(one, nms) for one in found]

    def __call__(self, images: Sequence[ImageArray]) -> list[Detections]:
        """Images in, detections out; the batch is taken as it is given."""
        return self.finish(self.run(self.prepare(images)))

    def intermediates(
        self, inputs: Inputs, names: Sequence[str]
    ) -> dict[str, npt.NDArray[Any]] | None:
        """Values within the graph, to find where an engine goes wrong; not for use in a hurry.

        Args:
            inputs: A batch of a size the engine takes.
            names: Values of the bundle's graph by name.

        Returns:
            Those the engine can show, or ``None`` from one that shows nothing.
        """
        return None

    def device_times(self, inputs: Inputs, runs: int) -> list[float] | None:
        """Milliseconds of each of some runs on the device's own clock, without copies to and fro.

        Args:
            inputs: A batch of a size the engine takes.
            runs: How often to run it.

        Returns:
            ``None`` from an engine that computes where the data already is.
        """
        return None

    @abstractmethod
    def _infer(self, inputs: Inputs) -> RawDetections:
        """Runs a batch whose size the engine can take."""
