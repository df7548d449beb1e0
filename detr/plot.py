"""The AP-over-latency plot as inline SVG; no plotting library in the base install."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 1040, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 24, 18, 52
_CHARACTER = 7.2  # width of a label's character, px
# From this ratio of slowest to fastest the axis is logarithmic.
_LOG_FROM = 8


@dataclass(frozen=True)
class Point:
    """One artifact in the plot.

    Attributes:
        name: Shown where the mouse rests.
        ms, low_ms, high_ms: Median latency and the ends of its whisker.
        ap: 0..1.
        color: CSS color.
        pareto: On the front: no other point is both faster and more accurate.
        label: Written beside it; the name by default, nothing where it is empty.
    """

    name: str
    ms: float
    low_ms: float
    high_ms: float
    ap: float
    color: str
    pareto: bool
    label: str | None = None

    @property
    def text(self) -> str:
        """What is written beside it."""
        return self.name if self.label is None else self.label


@dataclass(frozen=True)
class Axis:
    """Maps values to pixels.

    Attributes:
        low, high: Values at the ends.
        start, end: Pixels at the ends.
        log: Logarithmic.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(value)
        return self.start + (self.end - self.start) * (at - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round values along the axis."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            found = [m * 10.0**d for d in decades for m in (1, 2, 5)]
        else:
            step = nice_step(self.high - self.low, 8)
            first = math.ceil(self.low / step - 1e-9)
            found = [step * k for k in range(first, math.floor(self.high / step + 1e-9) + 1)]
        return [t for t in found if self.low * (1 - 1e-9) <= t <= self.high * (1 + 1e-9)]


def nice_step(span: float, count: int) -> float:
    """The smallest of 1, 2, 5 times a power of ten that cuts ``span`` into at most ``count``."""
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))


# What a page says in its style sheet, for a picture that stands alone.
_STYLE = (
    "text{font:12.5px sans-serif;fill:#1d2733}.tick,.axis-title{fill:#5f7488}"
    ".label{font-weight:650;paint-order:stroke;stroke:#fff;stroke-width:5px;"
    "stroke-linejoin:round;fill:currentColor}.grid{stroke:#e3e6ea}"
    ".axis{stroke:#5f7488;fill:none}.front{stroke:#5f7488;stroke-width:1.5;"
    "stroke-dasharray:5 5;fill:none}.whisker{stroke:currentColor;stroke-width:1.5;fill:none;"
    "opacity:.65}.faint{opacity:.3}.mark{fill:currentColor;stroke:#fff;stroke-width:2}"
    ".beaten{fill:#fff;stroke:currentColor;stroke-width:2.5}"
)


def standing_alone(svg: str) -> str:
    """A plot of :func:`ap_over_latency` as a file that needs no page around it."""
    head, rest = svg.split(">", 1)
    return (
        f'{head} xmlns="http://www.w3.org/2000/svg"><style>{_STYLE}</style>'
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>{rest}\n'
    )


def ap_over_latency(
    points: Sequence[Point],
    title_id: str = "plot",
    budget: float | None = None,
    from_zero: bool = True,
    axes: tuple[str, str] = ("end-to-end latency", "COCO AP"),
) -> str:
    """SVG of the points, the front joined by a line, whiskers from lowest to highest.

    Args:
        points: What to show.
        title_id: Prefix of the ids inside, for pages with several plots.
        budget: Milliseconds at which a line is drawn, where they are within the plot.
        from_zero: Whether a linear axis of latencies begins at zero, so that lengths are ratios.
        axes: What is measured along x, in milliseconds, and along y.
    """
    x, y = _latency_axis(points, from_zero), _ap_axis(points)
    named = [p for p in points if p.text]
    described = "; ".join(f"{p.name}: {100 * p.ap:.1f} AP at {p.ms:.1f} ms" for p in named)
    parts = [
        f'<svg class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-labelledby="{title_id}-title {title_id}-desc">',
        f'<title id="{title_id}-title">Average precision over latency</title>',
        f'<desc id="{title_id}-desc">{escape(described)}</desc>',
        *_frame(x, y, axes),
        *_front(points, x, y),
    ]
    taken: list[tuple[float, float, float, float]] = [
        (x(p.ms) - 9, y(100 * p.ap) - 9, x(p.ms) + 9, y(100 * p.ap) + 9) for p in points
    ]
    if budget is not None and x.low <= budget <= x.high:
        at = x(budget)
        parts += _budget_line(at, budget)
        taken.append((at - 2, _TOP, at + 2, _HEIGHT - _BOTTOM))
    # What is beaten lies below.
    for point in sorted(points, key=lambda p: p.pareto):
        parts += _marker(point, x, y)
    for point in named:
        parts.append(_label(point, x(point.ms), y(100 * point.ap), taken))
    parts.append("</svg>")
    return "".join(parts)


def _budget_line(at: float, budget: float) -> list[str]:
    """A line, and at its foot what it stands for, on the side that has room."""
    bottom = _HEIGHT - _BOTTOM
    left = at > _WIDTH / 2
    place, anchor = (at - 6, "end") if left else (at + 6, "start")
    return [
        f'<path d="M{at:.1f} {_TOP}V{bottom}" stroke="#c4483d"/>',
        f'<text class="tick" x="{place:.1f}" y="{bottom - 8}" text-anchor="{anchor}">'
        f"budget {budget:g} ms</text>",
    ]


def _latency_axis(points: Sequence[Point], from_zero: bool) -> Axis:
    low, high = min(p.low_ms for p in points), max(p.high_ms for p in points)
    end = _WIDTH - _RIGHT
    if high / low >= _LOG_FROM:
        return Axis(low / 1.3, high * 1.3, _LEFT, end, log=True)
    # Room for labels at both ends.
    first = 0.0 if from_zero else max(0.0, low - 0.15 * (high - low))
    return Axis(first, high + 0.08 * (high - first), _LEFT, end)


def _ap_axis(points: Sequence[Point]) -> Axis:
    """Never narrower than 5 AP, so that noise does not look like a landslide."""
    low, high = 100 * min(p.ap for p in points), 100 * max(p.ap for p in points)
    margin = max(0.25 * (high - low), (5 - (high - low)) / 2, 1.0)
    low, high = max(0.0, low - margin), min(100.0, high + margin)
    step = nice_step(high - low, 6)
    low, high = math.floor(low / step) * step, math.ceil(high / step) * step
    return Axis(low, high, _HEIGHT - _BOTTOM, _TOP)


def _frame(x: Axis, y: Axis, axes: tuple[str, str]) -> list[str]:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = []
    for tick in y.ticks():
        at = y(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{tick:g}</text>'
        )
    for tick in x.ticks():
        at = x(tick)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{bottom}"/>')
        parts.append(
            f'<text class="tick" x="{at:.1f}" y="{bottom + 18}" '
            f'text-anchor="middle">{tick:g}</text>'
        )
    scale = ", logarithmic" if x.log else ""
    middle = (_TOP + bottom) / 2
    parts += [
        f'<path class="axis" d="M{_LEFT} {_TOP}V{bottom}H{right}"/>',
        f'<text class="axis-title" x="{(_LEFT + right) / 2}" y="{_HEIGHT - 10}" '
        f'text-anchor="middle">{escape(axes[0])}, ms (median{scale}) – left is faster</text>',
        f'<text class="axis-title" transform="translate(16 {middle}) rotate(-90)" '
        f'text-anchor="middle">{escape(axes[1])} – up is better</text>',
    ]
    return parts


def _front(points: Sequence[Point], x: Axis, y: Axis) -> list[str]:
    front = sorted((p for p in points if p.pareto), key=lambda p: p.ms)
    if len(front) < 2:
        return []
    path = " ".join(f"{x(p.ms):.1f},{y(100 * p.ap):.1f}" for p in front)
    return [f'<polyline class="front" points="{path}"/>']


def _marker(point: Point, x: Axis, y: Axis) -> list[str]:
    at, height = x(point.ms), y(100 * point.ap)
    low, high = x(point.low_ms), x(point.high_ms)
    tip = (
        f"{point.name}: {100 * point.ap:.1f} AP, median {point.ms:.2f} ms "
        f"({point.low_ms:.2f} to {point.high_ms:.2f} ms)"
    )
    whisker = "whisker" if point.pareto else "whisker faint"
    return [
        f'<g style="color:{point.color}"><title>{escape(tip)}</title>',
        f'<path class="{whisker}" d="M{low:.1f} {height:.1f}H{high:.1f}'
        f'M{low:.1f} {height - 4:.1f}v8M{high:.1f} {height - 4:.1f}v8"/>',
        f'<circle class="{"mark" if point.pareto else "mark beaten"}" cx="{at:.1f}" '
        f'cy="{height:.1f}" r="7"/></g>',
    ]


def _label(
    point: Point, at: float, height: float, taken: list[tuple[float, float, float, float]]
) -> str:
    """The name beside its point, moved where it would cover another label or marker."""
    width = _CHARACTER * len(point.text)
    middle = at - width / 2
    places = [(middle, height - 14), (middle, height + 24)]
    places += [(at + 13, height - 8), (at - 13 - width, height - 8), (at + 13, height + 18)]
    places.append((at - 13 - width, height + 18))
    for k in range(4):
        for start in (middle, at - width, at):
            places += [(start, height - 14 - 16 * k), (start, height + 24 + 16 * k)]

    def box(place: tuple[float, float]) -> tuple[float, float, float, float]:
        return place[0], place[1] - 12, place[0] + width, place[1] + 3

    def free(place: tuple[float, float]) -> bool:
        left, top, right, bottom = box(place)
        inside = left >= _LEFT and right <= _WIDTH - 2 and top >= 0
        inside = inside and bottom <= _HEIGHT - _BOTTOM
        return inside and not any(
            left < other[2] and right > other[0] and top < other[3] and bottom > other[1]
            for other in taken
        )

    place = next(filter(free, places), places[0])
    taken.append(box(place))
    # A name that had to go far is joined with its point.
    far = abs(place[1] - height) > 30
    joined = (
        f'<path class="whisker" style="color:{point.color}" d="M{at:.1f} {height:.1f}'
        f'L{place[0] + width / 2:.1f} {place[1] - 4:.1f}"/>'
    )
    return (joined if far else "") + (
        f'<text class="label" x="{place[0]:.1f}" y="{place[1]:.1f}" '
        f'style="color:{point.color}">{escape(point.text)}</text>'
    )
