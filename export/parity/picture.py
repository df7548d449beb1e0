"""One image with what two engines found in it, one above the other."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from detr.data.draw import draw, masks_at
from detr.data.value_range import to_bytes
from detr.types import Detections, ImageArray

# Small images are enlarged, or the names on the boxes would cover them.
_WIDTH = 960
_TITLE = 22


def comparison_picture(
    image: ImageArray,
    reference: tuple[str, Detections],
    candidate: tuple[str, Detections],
    names: Sequence[str],
) -> bytes:
    """A PNG.

    Args:
        image: ``[h, w, 3]`` uint8 RGB.
        reference: Title and detections of the upper picture.
        candidate: Of the lower one.
        names: Class names.
    """
    scale = max(1.0, _WIDTH / image.shape[1])
    size = (round(image.shape[1] * scale), max(1, round(image.shape[0] * scale)))
    large = np.asarray(
        Image.fromarray(to_bytes(image, None)).resize(size, Image.Resampling.BILINEAR)
    )
    sheet = Image.new("RGB", (size[0], 2 * (size[1] + _TITLE)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (title, detections) in enumerate((reference, candidate)):
        top = row * (size[1] + _TITLE)
        text = f"{title}: {len(detections)} found"
        pen.text((6, top + 3), text, fill="black", font=ImageFont.load_default(15))
        drawn = draw(
            large, detections.boxes * scale, detections.labels, names, detections.scores,
            masks_at(detections.masks, image, large),
        )  # fmt: skip
        sheet.paste(Image.fromarray(drawn), (0, top + _TITLE))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()
