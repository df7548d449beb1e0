"""The candidates' AP over their latency, the budget and what is kept, as one picture."""

from __future__ import annotations

from bench.fit.model import Fit
from detr.plot import Point, ap_over_latency, standing_alone

_KEPT, _WITHIN, _OVER = "#c4483d", "#3b82c4", "#8b97a3"


def picture(fit: Fit) -> str:
    """An SVG file with names on the Pareto front, whiskers from least latency to 90th percentile.

    A candidate holds the budget where its whisker ends left of the line.
    """
    points = [
        Point(
            name=one.name if one.pareto or one.name == fit.kept else "",
            ms=one.ms,
            low_ms=one.min_ms,
            high_ms=one.p90_ms,
            ap=one.ap,
            color=_KEPT if one.name == fit.kept else _WITHIN if one.within else _OVER,
            pareto=one.pareto,
        )
        for one in fit.candidates
    ]
    return standing_alone(ap_over_latency(points, budget=fit.budget_ms))
