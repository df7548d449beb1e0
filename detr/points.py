"""Numbers of sampling points of deformable attention, and how its samples are laid out.

As many points on every level is one number P: locations are ``[..., V, P, 2]``, weights
``[..., V, P]``. Unequal numbers (D-FINE, arXiv 2410.13842: 3, 6, 3) are one per level, and the
samples of a level follow those of the one before: ``[..., K, 2]`` and ``[..., K]``, K being their
sum. No sample is there that is not read.
"""

from __future__ import annotations

from collections.abc import Sequence

# P of every level, or of each of them.
Points = int | tuple[int, ...]


def level_points(points: Points, levels: int) -> tuple[int, ...]:
    """P of each of so many levels.

    Raises:
        ValueError: Numbers for other levels than these.
    """
    if isinstance(points, int):
        return (points,) * levels
    if len(points) != levels:
        raise ValueError(f"points {list(points)} are of {len(points)} levels, not of {levels}")
    return points


def sample_axes(points: Points, levels: int) -> tuple[int, ...]:
    """The samples' axes: (V, P), or (K,) where levels have numbers of their own."""
    counts = level_points(points, levels)
    return (levels, points) if isinstance(points, int) else (sum(counts),)


def unequal(points: Points) -> tuple[int, ...] | None:
    """P of each level, where they are not one number."""
    return None if isinstance(points, int) else points


def joined_points(points: Sequence[int]) -> Points:
    """Numbers of the levels as one where all are the same."""
    counts = tuple(int(count) for count in points)
    return counts[0] if len(set(counts)) == 1 else counts
