"""Precision over recall as inline SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from detr.plot import Axis


def precision_over_recall(
    curves: Mapping[str, Sequence[float]],
    colors: Mapping[str, str],
    title: str,
    small: bool = False,
) -> str:
    """A line for each artifact.

    Args:
        curves: By artifact: precision at recalls 0, 0.01, ... 1.
        colors: By artifact, CSS colors.
        title: Above the plot.
        small: One of many, with fewer ticks.
    """
    width, height = (250, 190) if small else (520, 340)
    left, bottom, top = (34, 26, 22) if small else (52, 46, 26)
    x = Axis(0, 100, left, width - 12)
    y = Axis(0, 100, height - bottom, top)
    ticks = (0, 50, 100) if small else (0, 20, 40, 60, 80, 100)
    parts = [
        f'<svg class="curves" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="Precision over recall, {escape(title, quote=True)}">',
        f'<text class="label" x="{left}" y="14">{escape(title)}</text>',
    ]
    for tick in ticks:
        parts += [
            f'<line class="grid" x1="{left}" x2="{x.end}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>',
            f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{top}" y2="{y.start}"/>',
            f'<text class="tick" x="{left - 6}" y="{y(tick) + 4:.1f}" '
            f'text-anchor="end">{tick}</text>',
            f'<text class="tick" x="{x(tick):.1f}" y="{y.start + 16}" '
            f'text-anchor="{"end" if tick == 100 else "middle"}">{tick}</text>',
        ]
    if not small:
        middle = (top + y.start) / 2
        parts += [
            f'<text class="axis-title" x="{(left + x.end) / 2}" y="{height - 8}" '
            'text-anchor="middle">recall, %</text>',
            f'<text class="axis-title" transform="translate(14 {middle}) rotate(-90)" '
            'text-anchor="middle">precision, %</text>',
        ]
    for name, curve in curves.items():
        points = " ".join(
            f"{x(k * 100 / (len(curve) - 1)):.1f},{y(100 * v):.1f}" for k, v in enumerate(curve)
        )
        parts.append(
            f'<polyline points="{points}" style="stroke:{colors[name]}"><title>{escape(name)}'
            "</title></polyline>"
        )
    return "".join([*parts, "</svg>"])
