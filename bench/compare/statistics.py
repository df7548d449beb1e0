"""The few tests a benchmark needs, without a statistics library in the base install."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % confidence interval.

    Attributes:
        value, low, high: The estimate and its interval.
        p: Two-sided probability of a difference at least as large if there were none.
    """

    value: float
    low: float
    high: float
    p: float


def welch(a: Sequence[float], b: Sequence[float]) -> Interval:
    """Mean of ``b`` minus mean of ``a`` from independent repeats of unequal variance.

    Welch, The generalization of Student's problem when several different population variances are
    involved, Biometrika 34 (1947), with Satterthwaite's degrees of freedom.

    Raises:
        ValueError: Fewer than two values on either side.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError("needs two values on either side")
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    difference = float(y.mean() - x.mean())
    parts = [float(v.var(ddof=1)) / len(v) for v in (x, y)]
    error = math.sqrt(sum(parts))
    if error == 0:
        return Interval(difference, difference, difference, float(difference == 0))
    freedom = sum(parts) ** 2 / sum(p**2 / (len(v) - 1) for p, v in zip(parts, (x, y), strict=True))
    p = 2 * student_tail(abs(difference) / error, freedom)
    reach = error * student_quantile((1 - CONFIDENCE) / 2, freedom)
    return Interval(difference, difference - reach, difference + reach, p)


def student_tail(t: float, freedom: float) -> float:
    """Probability of Student's distribution beyond ``t`` >= 0 (DLMF 8.17, Abramowitz 26.7.1)."""
    return 0.5 * _incomplete_beta(freedom / (freedom + t * t), freedom / 2, 0.5)


def student_quantile(tail: float, freedom: float) -> float:
    """The ``t`` beyond which ``tail`` (below one half) of the distribution lies."""
    low, high = 0.0, 1.0
    while student_tail(high, freedom) > tail:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if student_tail(middle, freedom) > tail else (low, middle)
    return high


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function, by its continued fraction (DLMF 8.17.22)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly
        return 1 - _incomplete_beta(1 - x, b, a)
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
        + a * math.log(x) + b * math.log1p(-x)
    ) / a  # fmt: skip
    # Evaluated from the inside out; 300 terms are far more than double precision needs here.
    fraction = 1.0
    for n in range(300, 0, -1):
        m = n // 2
        if n % 2 == 0:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        else:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        fraction = 1 + term / fraction
    return front / fraction


def block_bootstrap_medians(samples: Float64Array, replicates: int, seed: int) -> Float64Array:
    """Medians of resampled series of calls that follow one another.

    Latencies of neighboring calls are alike (clocks, caches, other processes), so blocks of calls
    are drawn and not single ones: Künsch, The jackknife and the bootstrap for general stationary
    observations, Annals of Statistics 17 (1989).

    Args:
        samples: ``[N]`` in the order of the calls.
        replicates: How many resamplings.
        seed: Of the generator.

    Returns:
        ``[replicates]`` medians.
    """
    count = len(samples)
    length = max(1, round(count ** (1 / 3)))
    blocks = math.ceil(count / length)
    generator = np.random.default_rng(seed)
    starts = generator.integers(0, count - length + 1, size=(replicates, blocks))
    places = (starts[:, :, None] + np.arange(length)).reshape(replicates, -1)[:, :count]
    medians: Float64Array = np.median(samples[places], axis=1)
    return medians


def speed_ratio(
    base: Sequence[float], other: Sequence[float], turn: int, replicates: int = 2000
) -> Interval | None:
    """How many times as fast one engine is as another that took turns with it.

    The ratio of their median times. Turns are resampled, the same ones for both, since what slows a
    turn down slows down its neighbors: a paired block bootstrap.

    Args:
        base: Times of the one they are compared with, in the order of the calls.
        other: Times of the other; call ``k`` belongs to the turn of the base's call ``k``.
        turn: Calls in a turn.
        replicates: How many resamplings.

    Returns:
        ``None`` where five turns or fewer are too few for an interval.
    """
    times = np.array([base, other], dtype=np.float64)
    turns = times.shape[1] // turn
    if turns <= 5:
        return None
    value = float(np.median(times[0]) / np.median(times[1]))
    chosen = np.random.default_rng(0).integers(0, turns, size=(replicates, turns))
    whole = times[:, : turns * turn].reshape(2, turns, turn)
    medians = np.median(whole[:, chosen].reshape(2, replicates, -1), axis=2)
    return bootstrap_interval(value, medians[0] / medians[1])


def bootstrap_interval(value: float, resampled: Float64Array) -> Interval:
    """Percentile interval of resampled differences, and twice their smaller side of zero as p."""
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    # One is added: a p of zero would claim more than a finite number of resamplings can.
    beyond = min(int((resampled <= 0).sum()), int((resampled >= 0).sum()))
    p = min(1.0, 2 * (beyond + 1) / (len(resampled) + 1))
    return Interval(value, float(low), float(high), p)


def holm(values: Sequence[float]) -> list[float]:
    """P values corrected for their number (Holm, Scandinavian Journal of Statistics 6, 1979)."""
    order = sorted(range(len(values)), key=lambda k: values[k])
    corrected = [0.0] * len(values)
    most = 0.0
    for rank, k in enumerate(order):
        most = max(most, min(1.0, (len(values) - rank) * values[k]))
        corrected[k] = most
    return corrected
