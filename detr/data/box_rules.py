"""Which boxes count: one answer for checking, training and scoring."""

from __future__ import annotations

from array import array

from detr.data.dataset import Annotation, Scan
from detr.errors import UserError

# KITTI's and COCO's boxes touch or pass the border by a fraction of a pixel.
TOLERANCE = 1.5
# Pixels; farther is no picture, and too far is infinite in single precision.
_FAR = 1e7


def judge(
    read: Scan, size: tuple[int, int] | None, bounds: tuple[int, int] | None, drop: frozenset[str]
) -> Scan:
    """Sorts out what an image's label file says.

    A box without area is left out. One of negative size, or an object wholly outside the image, is
    an error: what was meant is unknown, and without it an object would be background. Errors whose
    code is in ``drop`` leave out the annotation instead.

    Args:
        read: All annotations of the file, and errors for the rows that cannot be read.
        size: (height, width) of the image, where known.
        bounds: (height, width) that training clips boxes to, if it does.
        drop: Codes.
    """
    found = Scan(warnings=list(read.warnings))
    for error in read.errors:
        _sort(error, found, drop)
    for annotation in read.annotations:
        problem = _problem(annotation, size, bounds)
        if problem is None:
            found.annotations.append(annotation)
        elif problem.code == "box-over-border":
            found.annotations.append(annotation)
            found.warnings.append(problem)
        elif problem.code == "box-empty" or annotation.ignore:
            found.warnings.append(problem)
        else:
            _sort(problem, found, drop)
    return found


def left_out(error: UserError) -> UserError:
    """An error that the user lets drop."""
    return UserError(error.code, f"{error.message}; left out")


def _sort(error: UserError, found: Scan, drop: frozenset[str]) -> None:
    if error.code in drop:
        found.warnings.append(left_out(error))
    else:
        found.errors.append(error)


def _problem(
    annotation: Annotation, size: tuple[int, int] | None, bounds: tuple[int, int] | None
) -> UserError | None:
    x0, y0, x1, y1 = annotation.box
    if x1 < x0 or y1 < y0:
        return UserError("box-inverted", f"{_shown(annotation)} has a negative size")
    if max(map(abs, annotation.box)) > _FAR:
        return UserError("box-outside", f"{_shown(annotation)} lies outside any image")
    if x0 == x1 or y0 == y1:
        return _empty(annotation)
    if size is not None:
        height, width = size
        if x1 <= 0 or y1 <= 0 or x0 >= width or y0 >= height:
            return UserError("box-outside", f"{_shown(annotation)} lies outside {_of(size)}")
        if min(x0, y0) < -TOLERANCE or x1 > width + TOLERANCE or y1 > height + TOLERANCE:
            return UserError(
                "box-over-border", f"{_shown(annotation)} passes the border of {_of(size)}"
            )
    return _empty(annotation) if _vanishes(annotation, bounds) else None


def _empty(annotation: Annotation) -> UserError:
    return UserError("box-empty", f"{_shown(annotation)} has no area; it is left out")


def _of(size: tuple[int, int]) -> str:
    return f"the image ({size[1]}x{size[0]})"


def _shown(annotation: Annotation) -> str:
    x0, y0, x1, y1 = annotation.box
    return f"{annotation.where}: box [{x0:g}, {y0:g}, {x1:g}, {y1:g}]"


def _vanishes(annotation: Annotation, bounds: tuple[int, int] | None) -> bool:
    """Whether training is left with nothing of a box, clipped and in single precision."""
    x0, y0, x1, y1 = array("f", annotation.box)
    if bounds is not None:
        height, width = bounds
        x0, x1 = min(max(x0, 0.0), width), min(max(x1, 0.0), width)
        y0, y1 = min(max(y0, 0.0), height), min(max(y1, 0.0), height)
    return not (x1 > x0 and y1 > y0)
