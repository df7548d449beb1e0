"""Which masks count: one answer for checking, training and scoring."""

from __future__ import annotations

from detr.data.box_rules import TOLERANCE, left_out
from detr.data.dataset import Annotation, Box, Scan
from detr.errors import UserError
from detr.masks import Rle, Size, intersection, of_box

# Objects may be hidden in large part, and boxes may tell their whole size. But what is seen of an
# object lies in its box: of a mask this share may be outside, a box may be so much larger.
_OUTSIDE = 0.1
_FILLED = 0.05


def judge_masks(found: Scan, size: Size, drop: frozenset[str]) -> Scan:
    """Sorts out the masks of what counts; an ignore region may do without.

    An object without a mask or with an unreadable one is an error; errors whose code is in ``drop``
    leave the object out instead. One whose mask has no pixel counts in scoring, as it does for
    COCO's evaluators, and is left out of training.

    Args:
        found: The annotations of an image whose boxes count.
        size: (height, width) of the image.
        drop: Codes.

    Returns:
        The same with what is wrong with masks besides. An object that is left has a mask that can
        be read.
    """
    judged = Scan([], list(found.errors), list(found.warnings))
    for annotation in found.annotations:
        try:
            warning = _judge(annotation, size)
        except UserError as error:
            if error.code in drop:
                judged.warnings.append(left_out(error))
            else:
                judged.errors.append(error)
            continue
        judged.annotations.append(annotation)
        if warning is not None:
            judged.warnings.append(warning)
    return judged


def _judge(annotation: Annotation, size: Size) -> UserError | None:
    where = annotation.where
    if annotation.mask is None:
        if annotation.ignore:
            return None
        raise UserError("mask-missing", f"{where}: the object has no mask")
    mask = annotation.mask()
    if annotation.ignore:
        return None
    seen = mask.rle(size)
    if not seen.area:
        if not isinstance(mask, Rle) and _outside(mask.box, size):
            raise UserError(
                "mask-outside",
                f"{where}: the mask lies outside the image ({size[1]}x{size[0]})",
            )
        return UserError("mask-empty", f"{where}: the mask has no pixel; training leaves it out")
    return _disagreement(annotation, seen)


def _outside(box: Box, size: Size) -> bool:
    x0, y0, x1, y1 = box
    return x1 <= 0 or y1 <= 0 or x0 >= size[1] or y0 >= size[0]


def _disagreement(annotation: Annotation, seen: Rle) -> UserError | None:
    """A mask that reaches beyond its box, or fills next to nothing of it."""
    x0, y0, x1, y1 = annotation.box
    a0, b0, a1, b1 = seen.box
    told = f"{annotation.where}: box [{x0:g}, {y0:g}, {x1:g}, {y1:g}]"
    if a0 < x0 - TOLERANCE or b0 < y0 - TOLERANCE or a1 > x1 + TOLERANCE or b1 > y1 + TOLERANCE:
        around = (x0 - TOLERANCE, y0 - TOLERANCE, x1 + TOLERANCE, y1 + TOLERANCE)
        share = 1 - intersection(seen, of_box(around).rle(seen.size)).area / seen.area
        if share > _OUTSIDE:
            return UserError("mask-box", f"{told} and mask disagree: {share:.0%} lie outside")
    filled = (a1 - a0) * (b1 - b0) / ((x1 - x0) * (y1 - y0))
    if filled < _FILLED:
        return UserError("mask-box", f"{told} and mask disagree: {filled:.1%} of it are filled")
    return None
