"""Evaluation-time preprocessing, once for training's validation, export and every engine.

An image is scaled to fit a fixed canvas (aspect kept), placed at the top left, normalised and
padded with zeros *after* normalisation, so padding is the mean colour and not black.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from PIL import Image
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from detr.config import Strict
from detr.data.value_range import ValueRange, to_bytes
from detr.errors import UserError
from detr.types import FloatArray, ImageArray

Triple = tuple[float, float, float]

_TYPES = (np.uint8, np.uint16, np.float32)


class PreprocessConfig(Strict):
    """How an image becomes a network input; stored with the weights.

    Attributes:
        size: Canvas (height, width) in pixels.
        mean, std: RGB, in units of 0..255 (ImageNet's by default).
        range: The values of a deeper picture that become 0 and 255 before that; ``None`` for
            pictures of 8 bits.
    """

    size: tuple[Annotated[int, Field(ge=16)], Annotated[int, Field(ge=16)]]
    mean: Triple = (123.675, 116.28, 103.53)
    std: Triple = (58.395, 57.12, 57.375)
    range: ValueRange | None = None

    @model_serializer(mode="wrap")
    def _unless_given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Sidecars of models for 8 bits stay what they were, and older releases read them."""
        content: dict[str, Any] = handler(self)
        if content.get("range") is None:
            content.pop("range", None)
        return content


@dataclass(frozen=True)
class Inputs:
    """A batch ready for a detector, numpy.

    Attributes:
        images: ``[B, 3, H, W]`` float32, normalised, zero padded.
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


def _resized(image: ImageArray, height: int, width: int) -> ImageArray:
    """Antialiased bilinear scaling, rows first and then columns, each rounded to bytes.

    In two calls, since Pillow 13 chooses an order by the sizes and earlier ones do not: a target
    must see the pixels the model was measured with.
    """
    wide = Image.fromarray(image).resize((width, image.shape[0]), Image.Resampling.BILINEAR)
    return np.asarray(wide.resize((width, height), Image.Resampling.BILINEAR))


def place(image: ImageArray, out: FloatArray, config: PreprocessConfig) -> None:
    """Normalises an image that fits the canvas into the top left of ``out`` ``[3, H, W]``."""
    scale = (1.0 / np.asarray(config.std, dtype=np.float32))[:, None, None]
    shift = np.asarray(config.mean, dtype=np.float32)[:, None, None]
    target = out[:, : image.shape[0], : image.shape[1]]
    np.subtract(image.transpose(2, 0, 1), shift, out=target)
    target *= scale


def preprocess(images: Sequence[ImageArray], config: PreprocessConfig) -> Inputs:
    """Scales, normalises and pads RGB images ``[h, w, 3]`` onto the config's canvas.

    Images of uint8 are taken as they are; those of uint16 and float32 become 8 bits by the config's
    range first.

    Raises:
        UserError: ``image-shape`` where an array is not ``[h, w, 3]`` of these types,
            ``image-range`` where one is float32 and the config has no range.
    """
    height, width = config.size
    batch = np.zeros((len(images), 3, height, width), dtype=np.float32)
    valid = np.zeros((len(images), 2), dtype=np.float32)
    original = np.zeros((len(images), 2), dtype=np.float32)
    for i, image in enumerate(images):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype not in _TYPES:
            raise UserError(
                "image-shape",
                f"image {i} of the batch is {image.dtype}{list(image.shape)}, "
                "expected uint8 [height, width, 3] RGB (or uint16, float32)",
            )
        image = to_bytes(image, config.range)
        h, w = fit(image.shape[0], image.shape[1], config.size)
        if (h, w) != image.shape[:2]:
            image = _resized(image, h, w)
        place(image, batch[i], config)
        valid[i] = h, w
        original[i] = images[i].shape[:2]
    return Inputs(batch, valid, original)
