"""Reading a picture of any kind as 8-bit RGB."""

from __future__ import annotations

import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from detr.errors import UserError
from detr.types import ImageArray

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")

Exif = Literal["apply", "ignore"]

_ORIENTATION = 0x0112  # EXIF tag; 5 to 8 are turned by 90 degrees
_TURNED = range(2, 9)
_DEEP = {"I", "I;16", "I;16B", "I;16L", "I;16N"}
# What Pillow raises on damaged files, depending on the format and on where the damage is.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


# Half of the size that is refused is worth a line on standard error to Pillow; not to us.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def read_image(path: Path, exif: Exif = "apply") -> ImageArray:
    """Decodes a picture as ``[h, w, 3]`` uint8 RGB.

    EXIF rotation is applied, as every viewer does, unless ``exif`` is ``ignore``. Grey is repeated,
    16-bit values are scaled by 1/257 (65535 becomes 255), CMYK is converted, and transparent pixels
    lie over black.

    Raises:
        UserError: ``image-missing``, or ``image-unreadable`` for a truncated, damaged or unknown
            file.
    """
    try:
        with Image.open(path) as file:
            file.load()
            image = ImageOps.exif_transpose(file) if exif == "apply" else file
            if image.mode in _DEEP:
                deep = np.asarray(image, dtype=np.float64) / 257
                image = Image.fromarray(np.clip(np.rint(deep), 0, 255).astype(np.uint8))
            elif image.has_transparency_data:
                layer = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", layer.size, (0, 0, 0, 255)), layer)
            return np.array(image.convert("RGB"))
    except FileNotFoundError as error:
        raise UserError("image-missing", f"{path}: no such image") from error
    except _DAMAGE as error:
        raise _unreadable(path, error) from error


@dataclass(frozen=True)
class Header:
    """What a picture's file says before its pixels.

    Attributes:
        stored: (height, width) of the raster as stored.
        orientation: EXIF orientation; 1 where there is none, 2 to 8 turn or mirror the raster.
        mode: Pillow's name of the pixel format.
    """

    stored: tuple[int, int]
    orientation: int
    mode: str

    @property
    def turned(self) -> bool:
        """Whether EXIF turns or mirrors it."""
        return self.orientation in _TURNED

    @property
    def upright(self) -> tuple[int, int]:
        """(height, width) as every viewer shows it."""
        return self.stored[::-1] if self.orientation >= 5 else self.stored

    def size(self, exif: Exif = "apply") -> tuple[int, int]:
        """(height, width) as :func:`read_image` gives it."""
        return self.upright if exif == "apply" else self.stored


def read_header(path: Path) -> Header:
    """Reads a picture's header, no pixel.

    Raises:
        UserError: ``image-missing`` or ``image-unreadable``.
    """
    try:
        with Image.open(path) as file:
            orientation = file.getexif().get(_ORIENTATION, 1)
            width, height = file.size
            return Header((height, width), orientation if orientation in _TURNED else 1, file.mode)
    except FileNotFoundError as error:
        raise UserError("image-missing", f"{path}: no such image") from error
    except _DAMAGE as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: BaseException) -> UserError:
    if isinstance(error, Image.DecompressionBombError):
        return UserError(
            "image-unreadable", f"{path}: more than {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels"
        )
    # An unknown format's message repeats the path.
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if str(path) in reason:
        reason = "not a picture"
    return UserError("image-unreadable", f"{path}: {reason}")
