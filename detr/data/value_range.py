"""Pictures of more than 8 bits: which of their values become black and white.

A thermal camera's 14-bit values between 7000 and 8200, divided by 257 like any 16-bit picture,
become five gray levels. Its range, told with the data, makes them 256.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator, Field

from detr.config import Strict
from detr.errors import UserError
from detr.types import ImageArray

# Images whose values are looked at for percentiles, and values of each at most.
SAMPLED_IMAGES, _SAMPLED_VALUES = 64, 1 << 16


def _ascending(values: tuple[float, float]) -> tuple[float, float]:
    if not values[0] < values[1]:
        raise ValueError(f"{values[0]:g} is not below {values[1]:g}")
    return values


Finite = Annotated[float, Field(allow_inf_nan=False)]
# The values that become 0 and 255.
ValueRange = Annotated[tuple[Finite, Finite], AfterValidator(_ascending)]


class Percentiles(Strict):
    """A range measured on the data: the values below which so many percent of all pixels lie.

    Attributes:
        percentiles: (low, high), 0 to 100.
    """

    percentiles: Annotated[
        tuple[Annotated[float, Field(ge=0, le=100)], Annotated[float, Field(ge=0, le=100)]],
        AfterValidator(_ascending),
    ]


def to_bytes(image: ImageArray, value_range: tuple[float, float] | None) -> npt.NDArray[np.uint8]:
    """A picture as 8 bits; one that has no more is returned as it is.

    Args:
        image: ``[h, w, 3]`` uint8, uint16 or float32.
        value_range: The values that become 0 and 255, what is beyond them is cut. None scales
            uint16 by 1/257, so that 65535 becomes 255.

    Raises:
        UserError: ``image-range`` for float32 without a range.
    """
    if image.dtype == np.uint8:
        return image  # type: ignore[return-value]
    if value_range is None:
        if image.dtype != np.uint16:
            raise UserError(
                "image-range",
                "an image of floating-point values has no black and white of its own: say range: "
                "[LOW, HIGH] in a data YAML",
            )
        value_range = (0.0, 65535.0)
    low, high = value_range
    scaled = (image.astype(np.float64) - low) * (255 / (high - low))
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


def measure(images: Sequence[ImageArray], percentiles: tuple[float, float]) -> tuple[float, float]:
    """The range of a data set from some of its images, each an equal part of it.

    Args:
        images: ``[h, w, 3]`` each.
        percentiles: (low, high), 0 to 100.

    Raises:
        UserError: ``image-range`` where the images are of one value.
    """
    values = []
    for image in images:
        flat = image.reshape(-1)
        values.append(flat[:: max(1, flat.size // _SAMPLED_VALUES)].astype(np.float64))
    low, high = (float(v) for v in np.percentile(np.concatenate(values), percentiles))
    if not low < high:
        raise UserError("image-range", f"range: all values looked at are {low:g}")
    return low, high
