"""Training batches that are a pure function of (seed, step).

The order of an epoch follows from (seed, epoch) and a sample's augmentation from (seed, step,
slot), so going on after a stop needs no sampler state: step s is the same batch in every run.
An image that cannot be read is replaced by one that follows from (seed, step, slot) as well.
Slots count through the images of all processes: two processes with two images each see what one
sees with four.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from detr.data.dataset import Dataset, Labels
from detr.data.preprocess import PreprocessConfig, place
from detr.data.value_range import to_bytes
from detr.errors import UserError
from detr.masks import Mask, Size
from detr.models import Target
from detr.types import FloatArray, ImageArray, IntArray
from distill.data.augment import AugmentConfig, augment
from distill.data.unreadable import LeaveOut, is_unreadable

# Decoded images are kept up to this many bytes: reading a small set again is a waste of a core.
CACHE_BYTES = 1 << 30
# Purposes of random numbers drawn from one seed.
_ORDER, _SAMPLE, _REPLACEMENT = range(3)


@dataclass
class Batch:
    """One training batch on the CPU.

    Attributes:
        images: ``[B, 3, H, W]`` float32, normalized and padded.
        valid_sizes: ``[B, 2]`` float32 (height, width) of each image inside the canvas.
        targets: Ground truth relative to the image without its padding.
        paths: The files, for messages.
        left_out: Files that could not be read and were replaced, and why.
        smaller: The same images on smaller canvases (height, width), where a step has several.
    """

    images: Tensor
    valid_sizes: Tensor
    targets: list[Target]
    paths: list[Path]
    left_out: list[tuple[Path, UserError]] = field(default_factory=list)
    smaller: dict[tuple[int, int], Batch] = field(default_factory=dict)

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return Batch(
            self.images.to(device, non_blocking=True),
            self.valid_sizes.to(device, non_blocking=True),
            [target.to(device) for target in self.targets],
            self.paths,
            self.left_out,
            {size: batch.to(device) for size, batch in self.smaller.items()},
        )


def _relative(boxes: FloatArray, size: tuple[int, ...]) -> Tensor:
    """Corners in pixels to cx cy w h in [0, 1]."""
    scale = np.array([size[1], size[0]], dtype=np.float32)
    low, high = boxes[:, :2] / scale, boxes[:, 2:] / scale
    return torch.from_numpy(np.concatenate(((low + high) / 2, high - low), 1))


def target_of(labels: Labels, size: Size, canvas: Size | None = None) -> Target:
    """Labels in pixels of an image, relative to it.

    Args:
        labels: Of the image.
        size: (height, width) of the image.
        canvas: (height, width) of the network's input, in whose top left the image lies; only
            masks depend on it. By default there is no padding.
    """
    return Target(
        boxes=_relative(labels.boxes, size),
        labels=torch.from_numpy(labels.labels),
        ignore=_relative(labels.ignore, size),
        masks=None if labels.masks is None else _padded(labels.masks, size, canvas or size),
    )


def _padded(masks: Sequence[Mask], size: Size, canvas: Size) -> Tensor:
    """Masks of an image as ``[G, H, W]`` bool, padded as the image is."""
    pixels = np.zeros((len(masks), *canvas), dtype=np.bool_)
    for row, mask in zip(pixels, masks, strict=True):
        row[: size[0], : size[1]] = mask.rle(size).pixels()
    return torch.from_numpy(pixels)


class Batches:
    """The batches of a training run.

    Args:
        dataset: Training images.
        preprocess: Canvas and normalization. Without a fixed canvas a batch is as large as the
            largest of this process's images, as in the papers' code.
        config: What varies.
        batch_size: Images per process and step.
        seed: Of order and augmentation.
        rank, world: This process and their number; processes share one epoch order.
        masks: Whether targets have masks; the data set must have one for every object.
    """

    def __init__(
        self,
        dataset: Dataset,
        preprocess: PreprocessConfig,
        config: AugmentConfig,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        masks: bool = False,
    ) -> None:
        self.dataset, self.preprocess, self.config = dataset, preprocess, config
        self.batch_size, self.seed, self.rank, self.world = batch_size, seed, rank, world
        self._read_labels = dataset.labels_with_masks if masks else dataset.labels
        self._cache: dict[int, ImageArray] = {}
        self._cached_bytes = 0
        self._epoch = lru_cache(maxsize=2)(self._permutation)

    def _permutation(self, epoch: int) -> IntArray:
        rng = np.random.default_rng((self.seed, _ORDER, epoch))
        return rng.permutation(len(self.dataset))

    @property
    def slots(self) -> range:
        """This process's places among the images of all processes in a step."""
        return range(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)

    def index(self, step: int, slot: int) -> int:
        """Which image stands in a slot of a step."""
        position = step * self.world * self.batch_size + slot
        epoch, offset = divmod(position, len(self.dataset))
        return int(self._epoch(epoch)[offset])

    def _image(self, i: int) -> ImageArray:
        if (image := self._cache.get(i)) is None:
            image = to_bytes(self.dataset.image(i), self.preprocess.range)
            if self._cached_bytes + image.nbytes <= CACHE_BYTES:
                self._cache[i] = image
                self._cached_bytes += image.nbytes
        return image

    def sample(
        self,
        step: int,
        slot: int,
        leave_out: LeaveOut | None = None,
        canvas: PreprocessConfig | None = None,
    ) -> tuple[ImageArray, Labels, Path]:
        """One augmented image, its labels in pixels, and its file.

        Args:
            step: The step.
            slot: Its place in the step.
            leave_out: Is told which files could not be read and were replaced; without it they
                raise.
            canvas: Another than the run's.
        """
        i, image = self._readable(step, slot, leave_out)
        rng = np.random.default_rng((self.seed, _SAMPLE, step, slot))
        labels = self._read_labels(i)
        image, labels = augment(image, labels, canvas or self.preprocess, self.config, rng)
        return image, labels, self.dataset.image_path(i)

    def _readable(self, step: int, slot: int, leave_out: LeaveOut | None) -> tuple[int, ImageArray]:
        """The image of a slot, or the one in its place."""
        first = self.index(step, slot)
        for i in self._candidates(first, step, slot):
            try:
                return i, self._image(i)
            except UserError as error:
                if leave_out is None or not is_unreadable(error):
                    raise
                leave_out(self.dataset.image_path(i), error)
                last = error
        raise last

    def _candidates(self, first: int, step: int, slot: int) -> Iterator[int]:
        yield first
        rng = np.random.default_rng((self.seed, _REPLACEMENT, step, slot))
        for i in rng.permutation(len(self.dataset)).tolist():
            if i != first:
                yield i

    def batch(self, step: int) -> Batch:
        """The batch of a step."""
        return self.on(self.preprocess, step)

    def on(self, preprocess: PreprocessConfig, step: int) -> Batch:
        """The batch of a step on some canvas."""
        left_out: list[tuple[Path, UserError]] = []

        def leave_out(path: Path, error: UserError) -> None:
            left_out.append((path, error))

        samples = [self.sample(step, slot, leave_out, preprocess) for slot in self.slots]
        sizes = [image.shape[:2] for image, _, _ in samples]
        canvas = preprocess.canvas(sizes)
        images = np.zeros((len(samples), 3, *canvas), dtype=np.float32)
        targets = []
        for row, (image, labels, _) in zip(images, samples, strict=True):
            place(image, row, preprocess)
            targets.append(target_of(labels, (image.shape[0], image.shape[1]), canvas))
        valid = torch.tensor(sizes, dtype=torch.float32)
        paths = [path for _, _, path in samples]
        return Batch(torch.from_numpy(images), valid, targets, paths, left_out)

    def stream(self, first: int, last: int, workers: int) -> Iterator[Batch]:
        """The batches of steps ``first`` to ``last - 1``, made ahead by ``workers`` threads."""
        with ThreadPoolExecutor(workers, thread_name_prefix="batches") as pool:
            ahead: list[Future[Batch]] = []
            try:
                for step in range(first, last + workers):
                    if step < last:
                        ahead.append(pool.submit(self.batch, step))
                    if step >= first + workers:
                        yield ahead.pop(0).result()
            finally:
                for future in ahead:
                    future.cancel()
