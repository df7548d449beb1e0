"""Reading a picture of any kind as 8-bit RGB, upright."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from detr.errors import UserError
from detr.types import ImageArray

SUFFIXES = (".png", ".jpg", ".jpeg")

_ORIENTATION = 0x0112  # EXIF tag; 5 to 8 are turned by 90 degrees
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


def read_image(path: Path) -> ImageArray:
    """Decodes a picture as ``[h, w, 3]`` uint8 RGB.

    EXIF rotation is applied, as every viewer does. Grey is repeated, 16-bit values are scaled by
    1/257 (65535 becomes 255), CMYK is converted, and transparent pixels lie over black.

    Raises:
        UserError: ``image-missing``, or ``image-unreadable`` for a truncated, damaged or unknown
            file.
    """
    try:
        with Image.open(path) as file:
            file.load()
            image = ImageOps.exif_transpose(file)
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


def read_size(path: Path) -> tuple[int, int]:
    """(height, width) of a picture as :func:`read_image` gives it, from the header alone.

    Raises:
        UserError: ``image-missing`` or ``image-unreadable``.
    """
    try:
        with Image.open(path) as file:
            width, height = file.size
            turned = file.getexif().get(_ORIENTATION, 1) >= 5
    except FileNotFoundError as error:
        raise UserError("image-missing", f"{path}: no such image") from error
    except _DAMAGE as error:
        raise _unreadable(path, error) from error
    return (width, height) if turned else (height, width)


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
