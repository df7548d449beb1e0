"""Reading a picture of any kind as RGB."""

from __future__ import annotations

import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from detr.data.value_range import to_bytes
from detr.errors import UserError
from detr.types import ImageArray

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")

Exif = Literal["apply", "ignore"]

_ORIENTATION = 0x0112  # EXIF tag; 5 to 8 are turned by 90 degrees
_TURNED = range(2, 9)
_DEEP = {"F", "I", "I;16", "I;16B", "I;16L", "I;16N"}
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


# Half of the size that is refused, and odd metadata, are worth a line on standard error to Pillow;
# not to us.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


def read_image(
    path: Path, exif: Exif = "apply", value_range: tuple[float, float] | None = None
) -> ImageArray:
    """Decodes a picture as ``[h, w, 3]`` RGB.

    EXIF rotation is applied, as every viewer does, unless ``exif`` is ``ignore``. Gray is repeated,
    CMYK is converted, and transparent pixels lie over black.

    Args:
        path: The file.
        exif: What becomes of EXIF rotation.
        value_range: The values of a deeper picture that become 0 and 255.

    Returns:
        uint8; with no range uint16 or float32 where the picture has such values.

    Raises:
        UserError: ``image-missing``; ``image-unreadable`` for a truncated, damaged or unknown file;
            ``image-range`` where a range is given and the picture has 8 bits.
    """
    try:
        with Image.open(path) as file:
            file.load()
            image = ImageOps.exif_transpose(file) if exif == "apply" else file
            pixels = _deep(image) if image.mode in _DEEP else _eight_bits(image)
    except FileNotFoundError as error:
        raise UserError("image-missing", f"{path}: no such image") from error
    except _DAMAGE as error:
        raise _unreadable(path, error) from error
    if value_range is None:
        return pixels
    if pixels.dtype == np.uint8:
        raise UserError(
            "image-range",
            f"{path}: has 8 bits, but a range of {value_range[0]:g} to {value_range[1]:g} is given",
        )
    return to_bytes(pixels, value_range)


def _eight_bits(image: Image.Image) -> ImageArray:
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, (0, 0, 0, 255)), layer)
    return np.array(image.convert("RGB"))


def _deep(image: Image.Image) -> ImageArray:
    """uint16 where the values fit, else float32."""
    values = np.asarray(image)
    fits = values.dtype != np.float32 and values.min() >= 0 and values.max() <= 65535
    gray = values.astype(np.uint16) if fits else values.astype(np.float32)
    return np.repeat(gray[..., None], 3, axis=2)  # type: ignore[return-value]  # dtype is lost


@dataclass(frozen=True)
class Header:
    """What a picture's file says before its pixels.

    Attributes:
        stored: (height, width) of the raster as stored.
        orientation: EXIF orientation; 1 where there is none, 2 to 8 turn or mirror the raster.
        deep: Whether its values are read as more than 8 bits.
        cut: Whether it has more, but only the upper 8 are read: color of 16 bits.
    """

    stored: tuple[int, int]
    orientation: int
    deep: bool
    cut: bool

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
            width, height = file.size
            bits = "".join(str(tile[3]) for tile in file.tile)
            orientation = 1
            # To look for EXIF data behind its pixels, Pillow decodes a PNG: 50 ms a KITTI frame.
            if file.format != "PNG" or _has_metadata(path):
                orientation = file.getexif().get(_ORIENTATION, 1)
            return Header(
                stored=(height, width),
                orientation=orientation if orientation in _TURNED else 1,
                deep=file.mode in _DEEP,
                cut=file.mode not in _DEEP and "16" in bits,
            )
    except FileNotFoundError as error:
        raise UserError("image-missing", f"{path}: no such image") from error
    except _DAMAGE as error:
        raise _unreadable(path, error) from error


def _has_metadata(png: Path) -> bool:
    """Whether a PNG has a chunk that could hold an EXIF orientation."""
    with png.open("rb") as file:
        file.seek(8)
        while len(start := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", start)
            if kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
                return True
            file.seek(length + 4, 1)
    return False


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
