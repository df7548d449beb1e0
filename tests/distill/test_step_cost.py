"""``bench train-step``: the parts of a step add up, and each is what it is called."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from bench.cli import main
from distill.recipe import Recipe
from distill.spans import Clock, span, timed


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_parts_leave_out_the_parts_within_them(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(Clock, "_now", lambda self: now[0])

    @timed("matching")
    def taking_five() -> None:
        now[0] += 5

    clock = Clock(torch.device("cpu"))
    with clock, span("losses"):
        now[0] += 2
        taking_five()
        now[0] += 1
        taking_five()
    taking_five()  # nobody listens any more
    assert dict(clock.seconds) == {"losses": 3, "matching": 10}


def test_every_method_is_split_into_its_parts(tiny: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny.to_yaml())
    command = ["train-step", "--config", str(path), "--methods", "kd_detr,qskd+fitnet,od_detr"]
    command += ["--turns", "1", "--threads", "1", "--json"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.stderr
    table = json.loads(result.stdout)
    assert table["clock"] == "processor" and table["size"] == list(tiny.input.size)
    rows = {row["method"]: row for row in table["rows"]}
    assert list(rows) == ["none", "kd_detr", "qskd+fitnet", "od_detr"]
    assert rows["none"]["added"] == 0 and rows["none"]["teacher"] == 0
    for name, row in rows.items():
        parts = ["student", "teacher", "extra_queries", "matching", "losses", "backward"]
        total = sum(row[part] for part in [*parts, "optimizer"])
        assert total == pytest.approx(row["total"], rel=1e-6), name
        assert row["matching"] > 0 and row["losses"] > 0
        assert name == "none" or row["teacher"] > 0


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--config", "dino-r1"], "preset-unknown"),
        (["--config", "dino-r18", "--methods", "fitnes"], "method-unknown"),
        (["--config", "dino-r18", "--size", "800"], "option-form"),
    ],
)
def test_mistakes_are_told(options: list[str], code: str) -> None:
    result = CliRunner().invoke(main, ["train-step", *options])
    assert result.exit_code == 2 and result.stderr.startswith(f"error[{code}]")
