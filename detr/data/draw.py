"""Boxes with class names and scores, and masks, drawn on a picture."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from detr.data.value_range import to_bytes
from detr.masks import Mask, Rle
from detr.types import ImageArray

# Share of the color in what a mask covers.
_TINT = 0.45


def class_color(label: int) -> tuple[int, int, int]:
    """A color that stays with a class; neighbors in the list are far apart in hue."""
    hue = (label * 0.618034 + 0.12) % 1.0  # the golden ratio spreads any number of hues
    r, g, b = colorsys.hsv_to_rgb(hue, 0.85, 1.0)
    return int(r * 255), int(g * 255), int(b * 255)


def _color(label: int) -> tuple[int, int, int]:
    return class_color(label) if label >= 0 else (150, 150, 150)


def _lay(image: ImageArray, mask: Rle, color: tuple[int, int, int]) -> None:
    """Tints the pixels of a mask, those at its edge fully: two of a class stay apart."""
    if not mask.area:
        return
    x0, y0, x1, y1 = (int(v) for v in mask.box)
    pixels = mask.pixels()[y0:y1, x0:x1]
    around = np.pad(pixels, 1)
    inner = around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]
    part = image[y0:y1, x0:x1]
    part[pixels] = (part[pixels] * (1 - _TINT) + np.array(color) * _TINT).astype(np.uint8)
    part[pixels & ~inner] = color


def _ink(ground: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black or white, whichever is read more easily on a color (contrast after WCAG 2)."""
    red, green, blue = ((c / 255) ** 2.2 for c in ground)
    light = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return (0, 0, 0) if light > 0.179 else (255, 255, 255)


@cache
def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def masks_at(
    masks: Sequence[Mask] | None, image: ImageArray, shown: ImageArray
) -> list[Mask | None] | None:
    """Masks of an image at the size at which it is shown; ``None`` without masks.

    Args:
        masks: In pixels of ``image``.
        image: ``[h, w, 3]``.
        shown: The same picture, ``[h', w', 3]``.
    """
    if masks is None:
        return None
    size = (shown.shape[0], shown.shape[1])
    ratio = (size[0] / image.shape[0], size[1] / image.shape[1])
    return [mask.moved(ratio, (0, 0), size) for mask in masks]


def draw(
    image: ImageArray,
    boxes: npt.NDArray[np.floating],
    labels: npt.NDArray[np.integer],
    names: Sequence[str],
    scores: npt.NDArray[np.floating] | None = None,
    masks: Sequence[Mask | None] | None = None,
) -> ImageArray:
    """Draws boxes on a copy of a picture, the last box first so that the best is on top.

    Args:
        image: ``[h, w, 3]`` RGB.
        boxes: ``[N, 4]`` x0 y0 x1 y1 in pixels.
        labels: ``[N]`` indices into ``names``; -1 is drawn gray and without a name.
        names: Class names.
        scores: ``[N]``, shown behind the name in percent.
        masks: N of the picture's size, laid under all boxes in the color of their class; None for
            a box without.

    Returns:
        ``[h, w, 3]`` uint8 RGB.
    """
    shown = to_bytes(image, None)
    if masks is not None:
        shown = shown.copy()
        for k in reversed(range(len(boxes))):
            if (mask := masks[k]) is not None:
                _lay(shown, mask.rle((image.shape[0], image.shape[1])), _color(int(labels[k])))
    canvas = Image.fromarray(shown)
    pen = ImageDraw.Draw(canvas)
    line = max(1, round(min(image.shape[:2]) / 200))
    font = _font(max(9, round(min(image.shape[:2]) / 28)))
    for k in reversed(range(len(boxes))):
        x0, y0, x1, y1 = (float(v) for v in boxes[k])
        label = int(labels[k])
        color = _color(label)
        left, right, top, bottom = min(x0, x1), max(x0, x1), min(y0, y1), max(y0, y1)
        pen.rectangle((left, top, right, bottom), outline=color, width=line)
        if label < 0:
            continue
        text = names[label] if scores is None else f"{names[label]} {float(scores[k]):.0%}"
        _, _, wide, high = pen.textbbox((0, 0), text, font=font)
        at = (min(max(0.0, left), max(0.0, canvas.width - wide - 3.0)), max(0.0, top - high - 2))
        pen.rectangle((*at, at[0] + wide + 3, at[1] + high + 2), fill=color)
        pen.text((at[0] + 2, at[1]), text, fill=_ink(color), font=font)
    return np.array(canvas)
