"""The candidates' AP over their latency, the budget and what is kept, as one picture."""

from __future__ import annotations

from collections.abc import Sequence

from bench.fit.model import Fit
from detr.plot import Point, ap_over_latency, standing_alone

_KEPT, _WITHIN, _OVER = "#c4483d", "#3b82c4", "#8b97a3"


def picture(fit: Fit) -> str:
    """An SVG file with names on the Pareto front, whiskers from least latency to 90th percentile.

    A candidate holds the budget where its whisker ends left of the line.
    """
    short = _short([one.name for one in fit.candidates])
    points = [
        Point(
            name=one.name,
            ms=one.ms,
            low_ms=one.min_ms,
            high_ms=one.p90_ms,
            ap=one.ap,
            color=_KEPT if one.name == fit.kept else _WITHIN if one.within else _OVER,
            pareto=one.pareto,
            label=short[one.name] if one.pareto or one.name == fit.kept else "",
        )
        for one in sorted(fit.candidates, key=lambda one: one.name == fit.kept)
    ]
    return standing_alone(ap_over_latency(points, budget=fit.budget_ms, from_zero=False))


def _short(names: Sequence[str]) -> dict[str, str]:
    """Names without the parts between hyphens that all of them end with, such as one canvas."""
    parts = [name.split("-") for name in names]
    common = 0
    while len(names) > 1 and all(
        len(one) > common + 1 and one[-1 - common] == parts[0][-1 - common] for one in parts
    ):
        common += 1
    return {n: "-".join(one[: len(one) - common]) for n, one in zip(names, parts, strict=True)}
