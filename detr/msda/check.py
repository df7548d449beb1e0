"""The checks in front of the kernels: shapes and types, before any memory is touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from detr.points import Points, level_points, sample_axes

MOST_SAMPLES = 512  # of a query in one head, as in cpu/kernels.hpp
MOST_CELLS = 2**24  # in a row or column of a level: float32 counts no further, see there too
MOST_TOKENS = 2**31 - 1  # of an image: the kernels count rows in 32 bits
VALUE_TYPES = ("float16", "bfloat16", "float32", "float64")


def dtype_name(array: Any) -> str:
    """``float32`` for a numpy or torch array of that type; also ``bfloat16`` of ``ml_dtypes``."""
    return str(array.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Sizes:
    """The sizes one call agrees on, with the shapes that follow from them.

    Attributes:
        points: P, or one number per level.
    """

    batch: int
    tokens: int
    heads: int
    channels: int
    queries: int
    shapes: tuple[tuple[int, int], ...]
    points: Points

    @property
    def level_points(self) -> tuple[int, ...]:
        """P of each level."""
        return level_points(self.points, len(self.shapes))

    @property
    def value(self) -> tuple[int, ...]:
        return (self.batch, self.tokens, self.heads, self.channels)

    @property
    def weights(self) -> tuple[int, ...]:
        return (self.batch, self.queries, self.heads, *sample_axes(self.points, len(self.shapes)))

    @property
    def locations(self) -> tuple[int, ...]:
        return (*self.weights, 2)

    @property
    def out(self) -> tuple[int, ...]:
        return (self.batch, self.queries, self.heads * self.channels)


def check_shapes(shapes: Sequence[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    """Returns the (height, width) of each level as plain ints.

    Raises:
        ValueError: There is no level, a level is not two positive whole numbers, or too large.
    """
    checked = []
    for index, shape in enumerate(shapes):
        pair = tuple(shape)
        if len(pair) != 2 or any(int(size) != size or size < 1 for size in pair):
            raise ValueError(f"level {index} must be (height, width), both 1 or more, not {pair}")
        if max(pair) > MOST_CELLS:
            raise ValueError(f"level {index} of {pair[0]} x {pair[1]} is too large")
        checked.append((int(pair[0]), int(pair[1])))
    if not checked:
        raise ValueError("deformable attention needs at least one level")
    if sum(height * width for height, width in checked) > MOST_TOKENS:
        raise ValueError(f"levels {checked} are too large together: more than {MOST_TOKENS} tokens")
    return tuple(checked)


def check_points(points: Sequence[int], levels: int) -> tuple[int, ...]:
    """Returns the number of points of each level as plain ints.

    Raises:
        ValueError: Not one number per level, or one that is no whole number or below 1.
    """
    if any(int(count) != count or count < 1 for count in points):
        raise ValueError(f"points must be whole numbers, 1 or more, not {tuple(points)}")
    return level_points(tuple(int(count) for count in points), levels)


def check_sizes(
    value: Any,
    shapes: Sequence[Sequence[int]],
    locations: Any,
    weights: Any,
    points: Sequence[int] | None = None,
) -> Sizes:
    """Checks the inputs against each other.

    Args:
        value: ``[B, S, M, D]``, float16, bfloat16, float32 or float64.
        shapes: (height, width) of each of V levels; S is the sum of their products.
        locations: ``[B, Q, M, V, P, 2]`` float32 (float64 where value is float64).
        weights: ``[B, Q, M, V, P]``, the type of ``locations``.
        points: Number of points of each level. Locations are then ``[B, Q, M, K, 2]`` and weights
            ``[B, Q, M, K]`` with K their sum.

    Raises:
        ValueError: A shape does not fit.
        TypeError: A type does not fit.
    """
    levels = check_shapes(shapes)
    if dtype_name(value) not in VALUE_TYPES:
        raise TypeError(f"value must be one of {', '.join(VALUE_TYPES)}, not {dtype_name(value)}")
    if len(value.shape) != 4:
        raise ValueError(f"value must be [B, S, M, D], not {tuple(value.shape)}")
    axes = ("B, Q, M, V, P, 2", 6) if points is None else ("B, Q, M, K, 2", 5)
    if len(locations.shape) != axes[1]:
        raise ValueError(f"locations must be [{axes[0]}], not {tuple(locations.shape)}")
    batch, tokens, heads, channels = (int(size) for size in value.shape)
    total = sum(height * width for height, width in levels)
    if tokens != total:
        raise ValueError(f"value has {tokens} tokens, the levels {levels} have {total}")
    chosen: Points = (
        int(locations.shape[4]) if points is None else check_points(points, len(levels))
    )
    sizes = Sizes(batch, tokens, heads, channels, int(locations.shape[1]), levels, chosen)
    if sum(sizes.level_points) > MOST_SAMPLES:
        raise ValueError(
            f"{len(levels)} levels of {chosen} points: at most {MOST_SAMPLES} samples in all"
        )
    check_like("locations", locations, sizes.locations)
    check_like("weights", weights, sizes.weights)
    wanted = "float64" if dtype_name(value) == "float64" else "float32"
    for name, array in (("locations", locations), ("weights", weights)):
        if dtype_name(array) != wanted:
            raise TypeError(
                f"{name} must be {wanted} where value is {dtype_name(value)}, "
                f"not {dtype_name(array)}"
            )
    return sizes


def check_like(name: str, array: Any, shape: tuple[int, ...], dtype: str | None = None) -> None:
    """Checks one array's shape and, where given, its type.

    Raises:
        ValueError: Another shape.
        TypeError: Another type.
    """
    if tuple(array.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, not {tuple(array.shape)}")
    if dtype is not None and dtype_name(array) != dtype:
        raise TypeError(f"{name} must be {dtype}, not {dtype_name(array)}")
