"""The picture of AP over steps stays readable with a dozen methods."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from distill.analysis.curves import ap_over_steps


def labels(svg: str) -> dict[str, float]:
    """Heights of the names at the right."""
    found = re.findall(r'<text x="[\d.]+" y="([\d.]+)" fill="[^"]*">([^<]*)<', svg)
    return {name: float(height) for height, name in found}


def test_names_of_lines_that_end_together_do_not_cover_each_other() -> None:
    curves = {f"m{i}": [[(500, 0.2), (1000, 0.3 + 0.001 * i)]] for i in range(13)}
    svg = ap_over_steps(curves | {"low": [[(500, 0.01), (1000, 0.02)]]})
    found = labels(svg)
    assert [*found] == [*(f"m{i}" for i in reversed(range(13))), "low"]
    heights = [*found.values()]
    assert all(second - first >= 15.9 for first, second in pairwise(heights))
    assert heights[0] > 0 and heights[-1] < 420


def test_colors_that_come_again_are_dashed() -> None:
    curves = {f"m{i}": [[(500, 0.1), (1000, 0.2)]] for i in range(10)}
    lines = re.findall(r"<polyline [^>]*>", ap_over_steps(curves))
    kinds = {(re.findall('stroke="([^"]*)"', x)[0], "dasharray" in x) for x in lines}
    assert len(lines) == len(kinds) == 10


def test_a_name_stands_where_its_line_ends() -> None:
    """And lines that stop on their way have their name at the right as well."""
    svg = ap_over_steps({"whole": [[(500, 0.1), (1000, 0.4)]], "half": [[(500, 0.1)]]})
    ends = re.findall(r'<path d="M([\d.]+) ([\d.]+)L[\d.]+ ([\d.]+)" stroke="#', svg)
    assert all(abs(float(end) - float(at)) < 0.2 for _, end, at in ends) and len(ends) == 2
    half, whole = sorted(float(x) for x, _, _ in ends)
    assert half - 52 == pytest.approx((whole - 52) / 2, abs=0.1)


def test_a_long_name_is_read_to_its_end() -> None:
    svg = ap_over_steps({"qskd+d3etr+stable_dino": [[(500, 0.1), (1000, 0.4)]]})
    (start,) = re.findall(r'<text x="([\d.]+)" y="[\d.]+" fill=', svg)
    assert float(start) + 7 * len("qskd+d3etr+stable_dino") < 900
