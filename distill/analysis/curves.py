"""AP over training steps as SVG: whether a comparison's runs have converged, and who leads when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from detr.plot import Axis, nice_step

# AP (0..1) by finished steps, of one run.
Curve = Sequence[tuple[int, float]]

_WIDTH, _HEIGHT = 900, 420
_LEFT, _TOP, _BOTTOM = 52, 16, 44
_COLORS = ("#5f7488", "#d97a1e", "#3b82c4", "#2f9e7a", "#c2559d", "#8b6fd0", "#8a8f1f", "#c4483d")
_LINE = 16  # px between two labels
_LETTER = 7.7  # px of a letter, on average
_GAP = 22  # px between the last step and the names


def ap_over_steps(curves: Mapping[str, Sequence[Curve]]) -> str:
    """One color per method, one line per seed, names in the order of the last AP; stands alone.

    Where there are more methods than colors, those of the second round are dashed.

    Args:
        curves: Runs by method; at least one has a point.
    """
    points = [point for runs in curves.values() for curve in runs for point in curve]
    last = max(step for step, _ in points)
    highest = 100 * max(ap for _, ap in points)
    step = nice_step(max(highest, 1.0), 6)
    right = _WIDTH - _GAP - _LETTER * max(map(len, curves)) - 8
    x = Axis(0, last, _LEFT, right)
    y = Axis(0, step * (highest // step + 1), _HEIGHT - _BOTTOM, _TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="13"><title>AP over training steps</title>',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        *_frame(x, y, right),
    ]
    ends = []
    for i, (name, runs) in enumerate(curves.items()):
        color = _COLORS[i % len(_COLORS)]
        dashes = ' stroke-dasharray="6 4"' if i // len(_COLORS) % 2 else ""
        for curve in runs:
            path = " ".join(f"{x(at):.1f},{y(100 * ap):.1f}" for at, ap in curve)
            parts.append(
                f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"{dashes}/>'
            )
            parts += [
                f'<circle cx="{x(at):.1f}" cy="{y(100 * ap):.1f}" r="3" fill="{color}"/>'
                for at, ap in curve
            ]
        reached = [curve[-1][1] for curve in runs if curve]
        if reached:
            end = max(curve[-1][0] for curve in runs if curve)
            ends.append((y(100 * sum(reached) / len(reached)), x(end), name, color))
    return "".join([*parts, *_labels(ends, right), "</svg>"])


def _frame(x: Axis, y: Axis, right: float) -> list[str]:
    bottom = _HEIGHT - _BOTTOM
    parts = []
    for tick in y.ticks():
        at = y(tick)
        parts.append(f'<path d="M{_LEFT} {at:.1f}H{right:.1f}" stroke="#e3e6ea"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in x.ticks():
        at = x(tick)
        parts.append(f'<path d="M{at:.1f} {_TOP}V{bottom}" stroke="#e3e6ea"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 18}" text-anchor="middle">{tick:g}</text>')
    parts.append(
        f'<text x="{(_LEFT + right) / 2:.1f}" y="{_HEIGHT - 8}" text-anchor="middle">steps</text>'
        f'<text transform="translate(14 {(_TOP + bottom) / 2}) rotate(-90)" '
        'text-anchor="middle">COCO AP</text>'
    )
    return parts


def _labels(ends: Sequence[tuple[float, float, str, str]], right: float) -> list[str]:
    """Names at the right, as near their lines' ends as they do not cover each other."""
    parts: list[str] = []
    ends = sorted(ends)
    places = _apart([height for height, *_ in ends])
    for (height, end, name, color), at in zip(ends, places, strict=True):
        parts.append(
            f'<path d="M{end:.1f} {height:.1f}L{right + _GAP - 4:.1f} {at:.1f}" stroke="{color}" '
            'stroke-width="0.7" fill="none"/>'
            f'<text x="{right + _GAP:.1f}" y="{at + 4:.1f}" fill="{color}">{escape(name)}</text>'
        )
    return parts


def _apart(heights: Sequence[float]) -> list[float]:
    """Ascending heights moved to be a line apart, as far up as down, within the picture."""
    groups: list[list[float]] = []
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _first(groups[-2]) + len(groups[-2]) * _LINE > _first(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    return [_first(group) + _LINE * i for group in groups for i in range(len(group))]


def _first(group: Sequence[float]) -> float:
    """Where the first of a block of lines stands whose middle is that of what they name."""
    block = _LINE * (len(group) - 1)
    first = sum(group) / len(group) - block / 2
    return max(float(_TOP), min(first, _HEIGHT - _BOTTOM - block))
