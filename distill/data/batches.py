"""Training batches that are a pure function of (seed, step).

The order of an epoch follows from (seed, epoch) and a sample's augmentation from (seed, step,
slot), so going on after a stop needs no sampler state: step s is the same batch in every run.
An image that cannot be read is replaced by one that follows from (seed, step, slot) as well.
Slots count through the images of all processes: two processes with two images each see what one
sees with four. A mosaic's further images follow from (seed, step, slot), and an image is mixed with
that of the slot before it, whichever process has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
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
from distill.data.composed import TILES, mixed, mosaic
from distill.data.unreadable import LeaveOut, is_unreadable

# Decoded images are kept up to this many bytes: reading a small set again is a waste of a core.
CACHE_BYTES = 1 << 30
# Purposes of random numbers drawn from one seed.
_ORDER, _SAMPLE, _REPLACEMENT, _MOSAIC, _MIXUP = range(5)


@dataclass
class Batch:
    """One training batch on the CPU.

    Attributes:
        images: ``[B, 3, H, W]`` float32, normalized and padded.
        valid_sizes: ``[B, 2]`` float32 (height, width) of each image inside the canvas.
        targets: Ground truth relative to the image without its padding.
        paths: The files of each image, for messages.
        left_out: Files that could not be read and were replaced, and why.
        smaller: The same images on smaller canvases (height, width), where a step has several.
    """

    images: Tensor
    valid_sizes: Tensor
    targets: list[Target]
    paths: list[tuple[Path, ...]]
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
        steps: Length of the run, of whose parts mosaic and mixup are told.
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
        steps: int | None = None,
    ) -> None:
        if steps is None and (config.mosaic or config.mixup):
            raise ValueError("mosaic and mixup act in a part of a run: tell its length")
        self.dataset, self.preprocess, self.config = dataset, preprocess, config
        self.batch_size, self.seed, self.rank, self.world = batch_size, seed, rank, world
        self.steps = steps or 0
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
    ) -> tuple[ImageArray, Labels, tuple[Path, ...]]:
        """One augmented image, its labels in pixels, and its files.

        Args:
            step: The step.
            slot: Its place in the step.
            leave_out: Is told which files could not be read and were replaced; without it they
                raise.
            canvas: Another than the run's.
        """
        preprocess, config = canvas or self.preprocess, self.config
        i, image = self._readable(self.index(step, slot), (step, slot), leave_out)
        labels, used = self._read_labels(i), [i]
        rng = np.random.default_rng((self.seed, _MOSAIC, step, slot))
        if config.mosaic is not None and config.mosaic.acts(step, self.steps, rng):
            further = [
                self._readable(first, (step, slot, tile), leave_out)
                for tile, first in enumerate(rng.integers(len(self.dataset), size=TILES - 1), 1)
            ]
            used += [i for i, _ in further]
            everything = [labels, *(self._read_labels(i) for i, _ in further)]
            pictures = [image, *(other for _, other in further)]
            image, labels = mosaic(pictures, everything, preprocess, config.mosaic, rng)
            config = config.of_composed
        rng = np.random.default_rng((self.seed, _SAMPLE, step, slot))
        image, labels = augment(image, labels, preprocess, config, rng)
        return image, labels, tuple(map(self.dataset.image_path, used))

    def _readable(
        self, first: int, place: tuple[int, ...], leave_out: LeaveOut | None
    ) -> tuple[int, ImageArray]:
        """An image, or the one in its place (step, slot and tile)."""
        for i in self._candidates(first, place):
            try:
                return i, self._image(i)
            except UserError as error:
                if leave_out is None or not is_unreadable(error):
                    raise
                leave_out(self.dataset.image_path(i), error)
                last = error
        raise last

    def _candidates(self, first: int, place: tuple[int, ...]) -> Iterator[int]:
        yield first
        rng = np.random.default_rng((self.seed, _REPLACEMENT, *place))
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

        share, slots = self._mixed(step), list(self.slots)
        if share is not None:  # each image is mixed with the one before it
            slots.insert(0, (slots[0] - 1) % (self.world * self.batch_size))
        samples = [self.sample(step, slot, leave_out, preprocess) for slot in slots]
        sizes = np.array([image.shape[:2] for image, _, _ in samples])
        canvas = preprocess.canvas(sizes.tolist())
        images = np.zeros((len(samples), 3, *canvas), dtype=np.float32)
        for row, (image, _, _) in zip(images, samples, strict=True):
            place(image, row, preprocess)
        labels, paths = [own for _, own, _ in samples], [files for _, _, files in samples]
        if share is not None:
            images = share * images[1:] + (1 - share) * images[:-1]
            sizes = np.maximum(sizes[1:], sizes[:-1])
            both = zip(pairwise(labels), sizes.tolist(), strict=True)
            labels = [mixed((own, before), (size[0], size[1])) for (before, own), size in both]
            paths = [own + before for before, own in pairwise(paths)]
        targets = [
            target_of(own, (size[0], size[1]), canvas)
            for own, size in zip(labels, sizes.tolist(), strict=True)
        ]
        valid = torch.from_numpy(sizes.astype(np.float32))
        return Batch(torch.from_numpy(images), valid, targets, paths, left_out)

    def _mixed(self, step: int) -> float | None:
        """An image's own share where the images of a step are mixed."""
        rng, config = np.random.default_rng((self.seed, _MIXUP, step)), self.config.mixup
        if config is None or not config.acts(step, self.steps, rng):
            return None
        return float(rng.uniform(*config.ratio))

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
