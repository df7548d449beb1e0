"""Tests against tables and against data made to order."""

from __future__ import annotations

import numpy as np
import pytest

from bench.compare.statistics import (
    block_bootstrap_medians,
    bootstrap_interval,
    holm,
    speed_ratio,
    student_quantile,
    student_tail,
    welch,
)


@pytest.mark.parametrize(
    ("freedom", "tail", "t"),
    [(1, 0.025, 12.7062), (2, 0.025, 4.30265), (5, 0.05, 2.01505), (30, 0.025, 2.04227)],
)
def test_student_agrees_with_the_printed_table(freedom: float, tail: float, t: float) -> None:
    assert student_quantile(tail, freedom) == pytest.approx(t, rel=1e-5)
    assert student_tail(t, freedom) == pytest.approx(tail, rel=1e-5)


def test_student_becomes_normal_and_is_one_half_at_zero() -> None:
    assert student_tail(1.959964, 1e6) == pytest.approx(0.025, rel=1e-4)
    assert student_tail(0, 3) == 0.5


@pytest.mark.parametrize("sizes", [(2, 2), (3, 5), (15, 15)])
def test_welch_agrees_with_scipy(sizes: tuple[int, int]) -> None:
    from scipy import stats

    generator = np.random.default_rng(sum(sizes))
    a, b = generator.normal(20, 1, sizes[0]), generator.normal(21.5, 3, sizes[1])
    expected = stats.ttest_ind(b, a, equal_var=False)
    interval = expected.confidence_interval(0.95)
    found = welch(a.tolist(), b.tolist())
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert found.value == pytest.approx(b.mean() - a.mean())


@pytest.mark.slow
def test_welch_covers_the_true_difference_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        one = welch(generator.normal(0, 1, 4).tolist(), generator.normal(1, 3, 5).tolist())
        covered += one.low <= 1 <= one.high
    assert 0.91 <= covered / 300 <= 0.99


def test_repeats_that_are_all_alike() -> None:
    assert welch([1.0, 1.0], [2.0, 2.0]).p == 0.0
    assert welch([1.0, 1.0], [1.0, 1.0]).p == 1.0
    with pytest.raises(ValueError, match="two values"):
        welch([1.0], [1.0, 2.0])


def test_blocks_widen_the_interval_of_calls_that_hang_together() -> None:
    generator = np.random.default_rng(1)
    steps = np.zeros(400)
    for k in range(1, 400):
        steps[k] = 0.95 * steps[k - 1] + generator.normal()
    shuffled = generator.permutation(steps)
    wide = np.std(block_bootstrap_medians(10 + steps, 400, 0))
    narrow = np.std(block_bootstrap_medians(10 + shuffled, 400, 0))
    assert wide > 1.5 * narrow


def test_bootstrap_never_claims_a_p_of_zero() -> None:
    found = bootstrap_interval(2.0, np.full(99, 2.0))
    assert found.p == pytest.approx(0.02)
    assert bootstrap_interval(0.0, np.linspace(-1, 1, 101)).p == 1.0


def test_holm_corrects_for_the_number_of_tests() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


def test_the_ratio_of_engines_that_took_turns_has_an_interval_that_holds_it() -> None:
    generator = np.random.default_rng(5)
    inside = 0
    for _ in range(100):
        # What slows a turn down slows both.
        drift = np.repeat(generator.lognormal(0, 0.3, 10), 5)
        base, other = (drift * generator.lognormal(0, 0.02, 50) * ms for ms in (20.0, 10.0))
        found = speed_ratio(base.tolist(), other.tolist(), turn=5)
        assert found is not None
        assert found.low <= found.value <= found.high
        inside += found.low <= 2 <= found.high
    assert inside >= 85


def test_too_few_turns_give_no_interval() -> None:
    assert speed_ratio([1.0] * 25, [1.0] * 25, turn=5) is None
    assert speed_ratio([2.0] * 30, [1.0] * 30, turn=5) is not None
