"""Evaluation-time preprocessing, once for training's validation, export and every engine.

An image is scaled (aspect kept), placed at the top left of a canvas, normalized and padded with
zeros *after* normalization, so padding is the mean color and not black. The canvas is a fixed one
that the image just fits, or, at the papers' sizes, as large as the largest image of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from PIL import Image
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from detr.config import Strict
from detr.data.value_range import ValueRange, to_bytes
from detr.errors import UserError
from detr.types import FloatArray, ImageArray

Level = Annotated[float, Field(ge=-1e6, le=1e6)]
Spread = Annotated[float, Field(ge=1e-6, le=1e6)]

_TYPES = (np.uint8, np.uint16, np.float32)


Side = Annotated[int, Field(ge=16, le=16384)]
# Canvases of bundles are a multiple of this: the coarsest map then has whole cells, and the pixel
# or so by which DETR's rounding exceeds ``long`` has room.
_STRIDE = 32


class PreprocessConfig(Strict):
    """How an image becomes a network input; stored with the weights.

    Either ``size``, or ``short`` and ``long``, or all three.

    Attributes:
        size: Canvas (height, width) in pixels. Alone: images are scaled to just fit it.
        short, long: The papers' size, in pixels: the short side is scaled to ``short``, or to less
            where the long side would exceed ``long`` (DETR's ``RandomResize([800], 1333)``). On a
            fixed canvas that this does not fit, the image is scaled to fit that.
        mean, std: RGB, in units of 0..255 (ImageNet's by default).
        range: The values of a deeper picture that become 0 and 255 before that; ``None`` for
            pictures of 8 bits.
    """

    size: tuple[Side, Side] | None = None
    short: Side | None = None
    long: Side | None = None
    mean: tuple[Level, Level, Level] = (123.675, 116.28, 103.53)
    std: tuple[Spread, Spread, Spread] = (58.395, 57.12, 57.375)
    range: ValueRange | None = None

    @model_serializer(mode="wrap")
    def _unless_given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Sidecars of models for 8 bits stay what they were, and older releases read them."""
        content: dict[str, Any] = handler(self)
        return {
            key: value
            for key, value in content.items()
            if value is not None or key not in ("size", "short", "long", "range")
        }

    @model_validator(mode="after")
    def _consistent(self) -> PreprocessConfig:
        if (self.short is None) != (self.long is None):
            raise ValueError("short and long go together")
        if self.short is not None and self.long is not None and self.short > self.long:
            raise ValueError(f"short {self.short} is more than long {self.long}")
        if self.size is None and self.short is None:
            raise ValueError("give a canvas (size: [height, width]), or short and long")
        return self

    def scaled(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) to which an image of a size is scaled."""
        if self.short is None or self.long is None:
            assert self.size is not None
            return fit(height, width, self.size)
        found = shortest_side(height, width, self.short, self.long)
        if self.size is None or (found[0] <= self.size[0] and found[1] <= self.size[1]):
            return found
        return fit(height, width, self.size)

    def canvas(self, sizes: Sequence[tuple[int, ...]]) -> tuple[int, int]:
        """(height, width) of a batch of scaled images: the fixed one, or the largest of them.

        Not rounded up to anything: the detectors take any size, and the papers' code pads no
        further either.
        """
        if self.size is not None:
            return self.size
        return max(size[0] for size in sizes), max(size[1] for size in sizes)

    @property
    def canvases(self) -> tuple[tuple[int, int], ...]:
        """Canvases of graphs that know one size: the fixed one, or landscape and portrait."""
        if self.size is not None:
            return (self.size,)
        assert self.short is not None and self.long is not None
        short, long = (-(-side // _STRIDE) * _STRIDE for side in (self.short, self.long))
        return ((short, long),) if short == long else ((short, long), (long, short))

    def meant_for(self, height: int, width: int) -> bool:
        """Whether an image belongs on the fixed canvas: of two orientations it is for one."""
        if self.short is None or self.size is None or self.size[0] == self.size[1]:
            return True
        return (height > width) == (self.size[0] > self.size[1])

    def on(self, canvas: tuple[int, int]) -> PreprocessConfig:
        """The same on a fixed canvas, if it has none of its own."""
        return self if self.size is not None else self.model_copy(update={"size": canvas})


@dataclass(frozen=True)
class Inputs:
    """A batch ready for a detector, numpy.

    Attributes:
        images: ``[B, 3, H, W]`` float32, normalized, zero padded.
        valid_sizes: ``[B, 2]`` float32 (height, width) of the image inside the canvas.
        original_sizes: ``[B, 2]`` float32 (height, width) of the image as read.
    """

    images: FloatArray
    valid_sizes: FloatArray
    original_sizes: FloatArray


def fit(height: int, width: int, canvas: tuple[int, int]) -> tuple[int, int]:
    """The largest size of the same aspect that fits the canvas, at least 1 x 1 pixel."""
    scale = min(canvas[0] / height, canvas[1] / width)
    return (
        min(canvas[0], max(1, round(height * scale))),
        min(canvas[1], max(1, round(width * scale))),
    )


def shortest_side(height: int, width: int, short: int, long: int | None = None) -> tuple[int, int]:
    """The size of the same aspect with a short side of ``short``, or less for ``long``'s sake.

    Rounded as in DETR (``datasets/transforms.py``): the long side is cut to whole pixels, and where
    ``long`` decides, the short side is rounded first, so that a very long image may exceed ``long``
    by a pixel or two.
    """
    low, high = min(height, width), max(height, width)
    if long is not None and high / low * short > long:
        short = max(1, round(long * low / high))
    if low == short:
        return height, width
    other = int(short * high / low)
    return (other, short) if width < height else (short, other)


def _resized(image: ImageArray, height: int, width: int) -> ImageArray:
    """Antialiased bilinear scaling, rows first and then columns, each rounded to bytes.

    In two calls, since Pillow 13 chooses an order by the sizes and earlier ones do not: a target
    must see the pixels the model was measured with.
    """
    wide = Image.fromarray(image).resize((width, image.shape[0]), Image.Resampling.BILINEAR)
    return np.asarray(wide.resize((width, height), Image.Resampling.BILINEAR))


def place(image: ImageArray, out: FloatArray, config: PreprocessConfig) -> None:
    """Normalizes an image that fits the canvas into the top left of ``out`` ``[3, H, W]``."""
    scale = (1.0 / np.asarray(config.std, dtype=np.float32))[:, None, None]
    shift = np.asarray(config.mean, dtype=np.float32)[:, None, None]
    target = out[:, : image.shape[0], : image.shape[1]]
    np.subtract(image.transpose(2, 0, 1), shift, out=target)
    target *= scale


def preprocess(images: Sequence[ImageArray], config: PreprocessConfig) -> Inputs:
    """Scales, normalizes and pads RGB images ``[h, w, 3]`` onto one canvas.

    Images of uint8 are taken as they are; those of uint16 and float32 become 8 bits by the config's
    range first.

    Raises:
        UserError: ``image-shape`` where an array is not ``[h, w, 3]`` of these types,
            ``image-range`` where one is float32 and the config has no range.
    """
    for i, image in enumerate(images):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype not in _TYPES:
            raise UserError(
                "image-shape",
                f"image {i} of the batch is {image.dtype}{list(image.shape)}, "
                "expected uint8 [height, width, 3] RGB (or uint16, float32)",
            )
    sizes = [config.scaled(*image.shape[:2]) for image in images]
    batch = np.zeros((len(images), 3, *config.canvas(sizes)), dtype=np.float32)
    for out, image, size in zip(batch, images, sizes, strict=True):
        shown = to_bytes(image, config.range)
        place(shown if size == image.shape[:2] else _resized(shown, *size), out, config)
    original = [image.shape[:2] for image in images]
    return Inputs(batch, _pairs(sizes), _pairs(original))


def _pairs(sizes: Sequence[tuple[int, ...]]) -> FloatArray:
    return np.array(sizes, dtype=np.float32).reshape(-1, 2)
