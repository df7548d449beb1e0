"""Bicubic resampling of one axis as a matrix.

A table that is multiplied from both sides is a constant times a parameter, whatever the canvas: an
exported graph has no Resize, whose cubic and antialiased kinds runtimes compute differently.
"""

from __future__ import annotations

import math

# Keys 1981: torch's plain resampling has the first, its antialiased one (and Pillow's) the second.
_SHARP, _SMOOTH = -0.75, -0.5


def bicubic_weights(outputs: int, inputs: int, antialias: bool) -> list[list[float]]:
    """``outputs x inputs`` weights of ``interpolate(mode="bicubic", align_corners=False)``.

    Args:
        outputs: Cells afterwards.
        inputs: Cells before.
        antialias: Each output averages all the cells it covers, and cells beyond the edge do not
            count; otherwise it reads the four around it, and the edge is repeated.
    """
    scale = inputs / outputs
    stretch = max(scale, 1.0) if antialias else 1.0
    rows = []
    for output in range(outputs):
        center = (output + 0.5) * scale
        row = [0.0] * inputs
        if antialias:
            first = max(int(center - 2 * stretch + 0.5), 0)
            last = min(int(center + 2 * stretch + 0.5), inputs)
            found = [_kernel((i + 0.5 - center) / stretch, _SMOOTH) for i in range(first, last)]
            row[first:last] = [weight / sum(found) for weight in found]
        else:
            nearest = math.floor(center - 0.5)
            for i in range(nearest - 1, nearest + 3):
                row[min(max(i, 0), inputs - 1)] += _kernel(i + 0.5 - center, _SHARP)
        rows.append(row)
    return rows


def _kernel(distance: float, a: float) -> float:
    """Cubic convolution (Keys 1981, equation 15)."""
    x = abs(distance)
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    if x < 2:
        return ((x - 5) * x + 8) * x * a - 4 * a
    return 0.0
